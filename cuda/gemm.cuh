// Y = W X for many columns of X: what a warp does with a stage, and all tiles of Y in turn.
#pragma once
#include "dequant.cuh"
#include "tiles.cuh"

namespace gemm {
// What one warp knows of its part of a tile of Y: of its tiles of 16 columns, its row blocks, their halves of 8
// rows: rows 2 q and 2 q + 1 of column g, then of column g + 8.
template <int kTiles, int kBlocks>
using Sums = float[kTiles][kBlocks][2][4];
template <Shape s>
using WarpSums = Sums<s.warp_columns / 16, s.warp_blocks()>;

// A lane's weights of a slice of one row block: 8 consecutive columns of rows g and g + 8, as pairs.
struct Weights { uint4 low, high; };
template <Matrix m>
__device__ __forceinline__ Weights load_weights(const u8* tile, int slice) {
  const int lane = threadIdx.x % 32;
  if constexpr (m.group == 0) {
    const uint4* rows = reinterpret_cast<const uint4*>(tile + slice * 1024) + lane;
    return {rows[0], rows[32]};
  } else {
    Fragment a, b;
    if constexpr (m.type == Type::kInt4) {
      const uint2 w = *reinterpret_cast<const uint2*>(tile + slice / 2 * 512 + lane * 16 + slice % 2 * 8);
      a = int4_fragment(w.x), b = int4_fragment(w.y);
    } else {
      const uint4 w = *reinterpret_cast<const uint4*>(tile + slice * 512 + lane * 16);
      if constexpr (m.type == Type::kInt8) a = int8_fragment(w.x, w.z), b = int8_fragment(w.y, w.w);
      else a = fp8_fragment(w.x, w.z), b = fp8_fragment(w.y, w.w);
    }
    return {{a.a0, a.a2, b.a0, b.a2}, {a.a1, a.a3, b.a1, b.a3}};
  }
}

// sums += one slice of 32 columns of the warp's row blocks times tiles of 16 columns of X, which are the rows of
// the mma: a lane's weights lie in registers as they were loaded, and no move is needed. x: this lane's.
template <Matrix m, int kBlockBytes, int kTiles, int kBlocks>
__device__ __forceinline__ void multiply_slice(Sums<kTiles, kBlocks>& sums, const u8* tile, int slice, const u8* x) {
  Weights w[kBlocks];
#pragma unroll
  for (int b = 0; b < kBlocks; b++) w[b] = load_weights<m>(tile + b * kBlockBytes, slice);
#pragma unroll
  for (int t = 0; t < kTiles; t++) {
    const uint4 v = *reinterpret_cast<const uint4*>(x + t * 1024), u = *reinterpret_cast<const uint4*>(x + t * 1024 + 512);
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
      mma<m.bf16()>(sums[t][b][0], {v.x, v.y, v.z, v.w}, w[b].low.x, w[b].low.y);
      mma<m.bf16()>(sums[t][b][1], {v.x, v.y, v.z, v.w}, w[b].high.x, w[b].high.y);
    }
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
      mma<m.bf16()>(sums[t][b][0], {u.x, u.y, u.z, u.w}, w[b].low.z, w[b].low.w);
      mma<m.bf16()>(sums[t][b][1], {u.x, u.y, u.z, u.w}, w[b].high.z, w[b].high.w);
    }
  }
}

// A group's scales of rows 2 q and 2 q + 1 of both halves, with the powers of two that its codes lack, and its biases.
struct Scales { float scale[2][2], bias[2][2]; };
template <Matrix m>
__device__ __forceinline__ Scales load_scales(const u8* tile, int group) {
  const u8* entries = tile + m.code_bytes() + group * (m.type == Type::kInt4 ? 64 : 32);
  const int q = threadIdx.x % 4;
  Scales s = {};
  if constexpr (m.type == Type::kInt4) {
    const uint4 v = *reinterpret_cast<const uint4*>(entries + q * 16);
    const u32 words[2][2] = {{v.x, v.z}, {v.y, v.w}};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      s.scale[i / 2][i % 2] = cvt_f32_f16(words[i / 2][i % 2] & 0xffff) * (i / 2 ? kSubnormal / 16 : kSubnormal);
      s.bias[i / 2][i % 2] = cvt_f32_f16(words[i / 2][i % 2] >> 16);
    }
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(entries + q * 8);
    const u32 words[2] = {v.x, v.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float scale = cvt_f32_f16(words[i % 2] >> i / 2 * 16 & 0xffff);
      s.scale[i / 2][i % 2] = m.type == Type::kInt8 ? scale * kSubnormal : scale;
      if constexpr (m.type == Type::kInt8) s.bias[i / 2][i % 2] = -128.0f * scale;
    }
  }
  return s;
}

// sums += one group of columns, scaled; some of the warp's columns of X at a time, for want of registers.
// x: this lane's of the group's first slice; x_sums: of column g.
template <Matrix m, Shape s>
__device__ __forceinline__ void multiply_group(WarpSums<s>& sums, const u8* tile, int group, const u8* x, const float* x_sums) {
  constexpr int kAll = s.warp_columns / 16, kTiles = smaller(kAll, 2), kBlocks = s.warp_blocks(), kBlockBytes = Stage<m, s>::kBlockBytes;
#pragma unroll
  for (int first = 0; first < kAll; first += kTiles) {
    Sums<kTiles, kBlocks> part = {};
#pragma unroll 2
    for (int i = 0; i < m.group / 32; i++)
      multiply_slice<m, kBlockBytes>(part, tile, group * (m.group / 32) + i, x + i * s.columns * 64 + first * 1024);
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
      const Scales scales = load_scales<m>(tile + b * kBlockBytes, group);
#pragma unroll
      for (int i = 0; i < kTiles * 8; i++) {
        const int t = i / 8, half = i / 4 % 2, c = i % 4;
        float& to = sums[first + t][b][half][c];
        to += scales.scale[half][c % 2] * part[t][b][half][c];
        if constexpr (m.has_sums()) to += scales.bias[half][c % 2] * x_sums[(first + t) * 16 + c / 2 * 8];
      }
    }
  }
}

// sums += the first tiles of a stage; kWhole: all.
template <Matrix m, Shape s, bool kWhole>
__device__ __forceinline__ void multiply_stage(WarpSums<s>& sums, const u8* stage, int tiles) {
  using S = Stage<m, s>;
  constexpr int kSlices = m.tile_cols() / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = warp / s.warps_down * s.warp_columns;
  const u8* weights = stage + warp % s.warps_down * s.warp_blocks() * S::kBlockBytes;
  const u8* x = stage + S::kX + column * 64 + lane * 16;
  const float* x_sums = reinterpret_cast<const float*>(stage + S::kSums) + column + lane / 4;
#pragma unroll(m.group == 0 ? S::kTiles : s.columns == kOperandColumns ? 1 : 4)
  for (int t = 0; t < S::kTiles; t++) {
    if (!kWhole && t >= tiles) break;
    const u8* tile = weights + t * m.tile_bytes();
    if constexpr (m.group == 0) {
      multiply_slice<m, S::kBlockBytes>(sums, tile, 0, x + t * s.columns * 64);
    } else {
#pragma unroll
      for (int group = 0; group < m.tile_cols() / m.group; group++)
        multiply_group<m, s>(sums, tile, group, x + (t * kSlices + group * m.group / 32) * s.columns * 64,
                             x_sums + (t * S::kTileGroups + group) * s.columns);
    }
  }
}

// Whether the columns of m are whole stages.
template <bool kFew, Matrix m>
constexpr bool kWholeStages = m.tiles() % Stage<m.rows_alone(), shape<kFew, m.rows_alone()>()>::kTiles == 0;

// All tiles of Y. use(row, column, low, high) receives rows row, row + 1 and row + 8, row + 9 of column `column`
// < n_columns; row is even. m: a matrix's rows_alone(); kWhole: its kWholeStages.
template <bool kFew, Matrix m, bool kWhole, class Use>
__device__ __forceinline__ void multiply_rows(const u8* weights, const View& x, int n_columns, Use use) {
  constexpr Shape s = shape<kFew, m>();
  using S = Stage<m, s>;
  constexpr int kBlocks = s.warp_blocks();
  const int column_tiles = ceil_div(n_columns, s.columns), tiles = ceil_div(m.row_blocks(), s.row_blocks) * column_tiles;
  const int mine = int(blockIdx.x) < tiles ? (tiles - 1 - int(blockIdx.x)) / kGrid + 1 : 0;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4, steps = S::steps(x.tiles);
  Place loading(column_tiles), at(column_tiles);
  WarpSums<s> sums = {};
  const auto finish = [&](int row_block, int first_column) {
#pragma unroll
    for (int i = 0; i < s.warp_columns / 8 * kBlocks; i++) {
      const int t = i / (2 * kBlocks), b = i / 2 % kBlocks, c = i % 2 * 2, column = first_column + t * 16 + i % 2 * 8 + g;
      float(&low)[4] = sums[t][b][0], (&high)[4] = sums[t][b][1];
      if (row_block + b < m.row_blocks() && column < n_columns)
        use((row_block + b) * 16 + 2 * q, column, make_float2(low[c], low[c + 1]), make_float2(high[c], high[c + 1]));
      low[c] = low[c + 1] = high[c] = high[c + 1] = 0;
    }
  };
  pipeline<S::kStages, S::kBytes>(
      dynamic_smem(), mine * steps,
      [&](u8* stage, int, u64* landed) {
        load_stage<m, s>(stage, landed, weights, x, loading, n_columns);
        loading.next(steps);
      },
      [&](const u8* stage, int) {
        const int row_block = at.row_tile * s.row_blocks + warp % s.warps_down * kBlocks;
        const int in_tile = warp / s.warps_down * s.warp_columns, first_column = at.column_tile * s.columns + in_tile;
        constexpr bool kAllWarps = kWarps / s.warps_down * s.warp_columns <= s.columns;  // have columns
        if (row_block < m.row_blocks() && (kAllWarps || in_tile < s.columns) && first_column < n_columns) {
          multiply_stage<m, s, kWhole>(sums, stage, smaller(S::kTiles, x.tiles - at.step * S::kTiles));
          if (at.step + 1 == steps) finish(row_block, first_column);
        }
        at.next(steps);
      });
}
template <bool kFew, Matrix m, class Use>
__device__ __forceinline__ void multiply(const u8* layer, const View& x, int n_columns, Use use) {
  multiply_rows<kFew, m.rows_alone(), kWholeStages<kFew, m>>(layer + m.offset, x, n_columns, use);
}
}  // namespace gemm
