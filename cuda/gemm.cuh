// Y = W X for many columns of X. A block makes tiles of Y of 128 rows by 128 columns; weights and columns
// pass through stages of shared memory, which all threads fill with cp.async.
#pragma once
#include "dequant.cuh"
#include "sync.cuh"

namespace gemm {
constexpr int kColumns = 128;                                // of a tile of Y
constexpr int kRowBlocks = 8;                                // of 16 rows: of a tile of Y
constexpr int kWarpBlocks = 2;                               // row blocks of a warp
constexpr int kWarpsDown = kRowBlocks / kWarpBlocks;         // warps that share their columns
constexpr int kWarpColumns = kColumns * kWarpsDown / kWarps;
constexpr int kWarpGroups = kWarpColumns / 8;                // groups of 8 columns of a warp
static_assert(kWarps % kWarpsDown == 0, "warps must tile 128 rows by 128 columns");

// What one warp knows of its part of a tile of Y: columns 2 q and 2 q + 1 of rows g and g + 8.
using Sums = float[kWarpBlocks][kWarpGroups][4];

// The columns that m is multiplied with, in the order of stages: [tile of kColumns][slice of 32 rows][kColumns][32],
// 16-bit; for integer weights also their sums over groups, [tile of kColumns][group][kColumns].
template <Matrix m>
struct Operand {
  static constexpr int kSlices = m.padded_cols() / 32;
  static constexpr int kGroups = m.has_sums() ? m.padded_cols() / m.group : 0;
  u8* x;
  float* sums;
  __device__ __forceinline__ u8* at(int column, int k8) const {
    return x + ((u64)(column / kColumns * kSlices + k8 / 4) * kColumns + column % kColumns) * 64 + k8 % 4 * 16;
  }
  __device__ __forceinline__ u16* element(int column, int k) const { return reinterpret_cast<u16*>(at(column, k / 8)) + k % 8; }
  __device__ __forceinline__ float* sum(int column, int group) const {
    return sums + (u64)(column / kColumns * kGroups + group) * kColumns + column % kColumns;
  }
};

// One step along the rows of X, in shared memory: weights [row block][tile], columns [slice][kColumns][32], sums.
template <Matrix m>
struct Stage {
  static constexpr int kTiles = m.tile_cols() < 64 ? 64 / m.tile_cols() : 1;
  static constexpr int kBlockBytes = kTiles * m.tile_bytes();
  static constexpr int kX = kRowBlocks * kBlockBytes;  // offsets
  static constexpr int kSums = kX + kTiles * m.tile_cols() * kColumns * 2;
  static constexpr int kTileGroups = m.has_sums() ? m.tile_cols() / m.group : 0;
  static constexpr int kBytes = kSums + kTiles * kTileGroups * kColumns * 4;
  static constexpr int kSteps = ceil_div(m.tiles(), kTiles);  // of a tile of Y
  static constexpr int kStages = smaller(4, kSharedBytes / kBytes);
  static_assert(kStages >= 2, "copying and computing need a stage each");
};

// `bytes` bytes, a multiple of 16, by all threads of the block.
template <int kMost>
__device__ __forceinline__ void copy(u8* to, const u8* from, int bytes) {
#pragma unroll
  for (int i = 0; i < ceil_div(kMost, kConsumers * 16); i++) {
    const int at = (i * kConsumers + threadIdx.x) * 16;
    if (at < bytes) cp_async_16(to + at, from + at);
  }
}

// Runs `count` stages through shared memory: load(stage, i) starts copies, use(stage, i) reads what landed.
// Nobody may use that memory before, and nobody does after.
template <int kStages, int kBytes, class Load, class Use>
__device__ __forceinline__ void pipeline(u8* memory, int count, Load load, Use use) {
#pragma unroll 1
  for (int i = 0; i < kStages - 1; i++) {
    if (i < count) load(memory + i * kBytes, i);
    cp_async_commit_group();
  }
  int reading = 0, filling = kStages - 1;
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    cp_async_wait_group<kStages - 2>();
    sync_consumers();  // publishes stage i; stage i - 1 may be overwritten
    if (i + kStages - 1 < count) load(memory + filling * kBytes, i + kStages - 1);
    cp_async_commit_group();
    use(memory + reading * kBytes, i);
    if (++reading == kStages) reading = 0;
    if (++filling == kStages) filling = 0;
  }
  sync_consumers();  // all stages may be overwritten
}

template <Matrix m>
__device__ __forceinline__ void load_stage(u8* stage, const u8* weights, const Operand<m>& x, int row_tile, int column_tile, int step) {
  using S = Stage<m>;
  using O = Operand<m>;
  const int first = step * S::kTiles, tiles = smaller(S::kTiles, m.tiles() - first);
  constexpr int kVectors = S::kBlockBytes / 16;
#pragma unroll
  for (int i = 0; i < ceil_div(kRowBlocks * kVectors, kConsumers); i++) {
    const int at = i * kConsumers + threadIdx.x, vector = at % kVectors;
    const int row_block = smaller(row_tile * kRowBlocks + at / kVectors, m.row_blocks() - 1);  // those past the end are not used
    if (at < kRowBlocks * kVectors && vector < tiles * m.tile_bytes() / 16)
      cp_async_16(stage + at * 16, weights + (u64)row_block * m.row_block_bytes() + first * m.tile_bytes() + vector * 16);
  }
  constexpr int kTileX = m.tile_cols() * kColumns * 2, kTileSums = S::kTileGroups * kColumns * 4;
  copy<S::kTiles * kTileX>(stage + S::kX, x.x + ((u64)column_tile * O::kSlices * kColumns * 64 + first * kTileX), tiles * kTileX);
  if constexpr (m.has_sums())
    copy<S::kTiles * kTileSums>(stage + S::kSums, reinterpret_cast<const u8*>(x.sums + column_tile * O::kGroups * kColumns) + first * kTileSums,
                                tiles * kTileSums);
}

// sums += one slice of 32 columns of the warp's row blocks times groups of 8 columns of X.
template <bool kBf16, int kGroups>
__device__ __forceinline__ void multiply_slice(float (&sums)[kWarpBlocks][kGroups][4], const Fragment (&first)[kWarpBlocks],
                                               const Fragment (&second)[kWarpBlocks], const u8* x) {
#pragma unroll
  for (int j = 0; j < kGroups; j++) {
    const uint4 b = *reinterpret_cast<const uint4*>(x + j * 8 * 64);
#pragma unroll
    for (int i = 0; i < kWarpBlocks; i++) mma<kBf16>(sums[i][j], first[i], b.x, b.y);
#pragma unroll
    for (int i = 0; i < kWarpBlocks; i++) mma<kBf16>(sums[i][j], second[i], b.z, b.w);
  }
}

// Both fragments of a slice of one row block.
template <Matrix m>
__device__ __forceinline__ void load_fragments(Fragment& first, Fragment& second, const u8* tile, int slice) {
  const int lane = threadIdx.x % 32;
  const uint4* codes = reinterpret_cast<const uint4*>(tile) + lane;
  if constexpr (m.group == 0) {
    const uint4 low = codes[0], high = codes[32];
    first = {low.x, high.x, low.y, high.y}, second = {low.z, high.z, low.w, high.w};
  } else if constexpr (m.type == Type::kInt4) {
    const uint2 w = *reinterpret_cast<const uint2*>(tile + slice / 2 * 512 + lane * 16 + slice % 2 * 8);
    first = int4_fragment(w.x), second = int4_fragment(w.y);
  } else {
    const uint4 w = codes[slice * 32];
    if constexpr (m.type == Type::kInt8) first = int8_fragment(w.x, w.z), second = int8_fragment(w.y, w.w);
    else first = fp8_fragment(w.x, w.z), second = fp8_fragment(w.y, w.w);
  }
}

// A group's scales of rows g and g + 8, with the powers of two that its codes lack, and its biases.
struct Scales { float scale[2], bias[2]; };
template <Matrix m>
__device__ __forceinline__ Scales load_scales(const u8* tile, int group) {
  const u8* entries = tile + m.code_bytes() + group * (m.type == Type::kInt4 ? 64 : 32);
  const int g = threadIdx.x % 32 / 4;
  if constexpr (m.type == Type::kInt4) {
    const uint2 v = *reinterpret_cast<const uint2*>(entries + g * 8);
    return {{cvt_f32_f16(v.x & 0xffff) * kSubnormal, cvt_f32_f16(v.y & 0xffff) * (kSubnormal / 16)}, {cvt_f32_f16(v.x >> 16), cvt_f32_f16(v.y >> 16)}};
  } else {
    const u32 v = *reinterpret_cast<const u32*>(entries + g * 4);
    const float low = cvt_f32_f16(v & 0xffff), high = cvt_f32_f16(v >> 16);
    if constexpr (m.type == Type::kInt8) return {{low * kSubnormal, high * kSubnormal}, {-128.0f * low, -128.0f * high}};
    else return {{low, high}, {0, 0}};
  }
}

template <Matrix m>
__device__ __forceinline__ void load_fragments(Fragment (&first)[kWarpBlocks], Fragment (&second)[kWarpBlocks], const u8* tile, int slice) {
#pragma unroll
  for (int i = 0; i < kWarpBlocks; i++) load_fragments<m>(first[i], second[i], tile + i * Stage<m>::kBlockBytes, slice);
}

// sums += one group of columns, scaled. Some of the warp's columns at a time, for want of registers.
// x: this lane's of the group's first slice; x_sums: of columns 2 q and 2 q + 1.
template <Matrix m>
__device__ __forceinline__ void multiply_group(Sums& sums, const u8* tile, int group, const u8* x, const float* x_sums) {
  constexpr int kParts = 2, kGroups = kWarpGroups / kParts;
#pragma unroll
  for (int p = 0; p < kParts; p++) {
    float part[kWarpBlocks][kGroups][4] = {};
#pragma unroll 1
    for (int s = 0; s < m.group / 32; s++) {
      Fragment first[kWarpBlocks], second[kWarpBlocks];
      load_fragments<m>(first, second, tile, group * (m.group / 32) + s);
      multiply_slice<false>(part, first, second, x + (s * kColumns + p * kGroups * 8) * 64);
    }
#pragma unroll
    for (int i = 0; i < kWarpBlocks; i++) {
      const Scales scales = load_scales<m>(tile + i * Stage<m>::kBlockBytes, group);
#pragma unroll
      for (int j = 0; j < kGroups; j++) {
        float(&to)[4] = sums[i][p * kGroups + j];
        float2 x_sum = {};
        if constexpr (m.has_sums()) x_sum = *reinterpret_cast<const float2*>(x_sums + (p * kGroups + j) * 8);
#pragma unroll
        for (int c = 0; c < 4; c++) {
          to[c] += scales.scale[c / 2] * part[i][j][c];
          if constexpr (m.has_sums()) to[c] += scales.bias[c / 2] * (c % 2 ? x_sum.y : x_sum.x);
        }
      }
    }
  }
}

// sums += the first tiles of a stage.
template <Matrix m>
__device__ __forceinline__ void multiply_stage(Sums& sums, const u8* stage, int tiles) {
  using S = Stage<m>;
  constexpr int kSlices = m.tile_cols() / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = warp / kWarpsDown * kWarpColumns;
  const u8* weights = stage + warp % kWarpsDown * kWarpBlocks * S::kBlockBytes;
  const u8* x = stage + S::kX + (column + lane / 4) * 64 + lane % 4 * 16;
  const float* x_sums = reinterpret_cast<const float*>(stage + S::kSums) + column + lane % 4 * 2;
#pragma unroll
  for (int t = 0; t < S::kTiles; t++) {
    if (t >= tiles) break;
    const u8* tile = weights + t * m.tile_bytes();
    if constexpr (m.group == 0) {
      Fragment first[kWarpBlocks], second[kWarpBlocks];
      load_fragments<m>(first, second, tile, 0);
      multiply_slice<m.bf16()>(sums, first, second, x + t * kSlices * kColumns * 64);
    } else {
#pragma unroll
      for (int group = 0; group < m.tile_cols() / m.group; group++)
        multiply_group<m>(sums, tile, group, x + (t * kSlices + group * m.group / 32) * kColumns * 64,
                          x_sums + (t * S::kTileGroups + group) * kColumns);
    }
  }
}

// A block's steps, tile after tile. Neighbouring blocks have tiles that share their weights.
struct Steps {
  int column_tiles, tile = blockIdx.x, step = 0, row_tile, column_tile;
  __device__ __forceinline__ explicit Steps(int column_tiles) : column_tiles(column_tiles) { place(); }
  __device__ __forceinline__ void next(int steps_of_a_tile) {
    if (++step < steps_of_a_tile) return;
    step = 0, tile += kGrid;
    place();
  }

 private:
  __device__ __forceinline__ void place() { row_tile = tile / column_tiles, column_tile = tile - row_tile * column_tiles; }
};

// All tiles of Y. use(row, column, low, high) receives rows `row` and `row + 8` of column `column` < n_columns.
template <Matrix m, class Use>
__device__ void multiply(const u8* weights, const Operand<m>& x, int n_columns, Use use) {
  using S = Stage<m>;
  const int column_tiles = ceil_div(n_columns, kColumns), tiles = ceil_div(m.row_blocks(), kRowBlocks) * column_tiles;
  const int mine = int(blockIdx.x) < tiles ? (tiles - 1 - int(blockIdx.x)) / kGrid + 1 : 0;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  Steps loading(column_tiles), at(column_tiles);
  Sums sums = {};
  const auto finish = [&](int row_block, int first_column) {
#pragma unroll
    for (int b = 0; b < kWarpBlocks; b++)
#pragma unroll
      for (int j = 0; j < kWarpGroups; j++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int column = first_column + j * 8 + 2 * q + c;
          if (row_block + b < m.row_blocks() && column < n_columns) use((row_block + b) * 16 + g, column, sums[b][j][c], sums[b][j][2 + c]);
          sums[b][j][c] = sums[b][j][2 + c] = 0;
        }
  };
  pipeline<S::kStages, S::kBytes>(
      dynamic_smem(), mine * S::kSteps,
      [&](u8* stage, int) {
        load_stage<m>(stage, weights, x, loading.row_tile, loading.column_tile, loading.step);
        loading.next(S::kSteps);
      },
      [&](const u8* stage, int) {
        const int row_block = at.row_tile * kRowBlocks + warp % kWarpsDown * kWarpBlocks;
        const int first_column = at.column_tile * kColumns + warp / kWarpsDown * kWarpColumns;
        if (row_block < m.row_blocks() && first_column < n_columns) {
          multiply_stage<m>(sums, stage, smaller(S::kTiles, m.tiles() - at.step * S::kTiles));
          if (at.step + 1 == S::kSteps) finish(row_block, first_column);
        }
        at.next(S::kSteps);
      });
}
}  // namespace gemm
