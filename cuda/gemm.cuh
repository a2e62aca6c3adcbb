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
static_assert(kWarps % kWarpsDown == 0 && kWarpColumns % 32 == 0, "warps must tile 128 rows by 128 columns");

// What one warp knows of its part of a tile of Y: of its tiles of 16 columns, its row blocks, their halves of 8
// rows: rows 2 q and 2 q + 1 of column g, then of column g + 8.
constexpr int kWarpTiles = kWarpColumns / 16;
using Sums = float[kWarpTiles][kWarpBlocks][2][4];

// The columns that m is multiplied with, in the order of stages and of fragments, so that a lane reads the four
// words of an mma's operand at once: [tile of kColumns][slice of 32 rows][kColumns / 16][step of 4 rows][lane]
// [pair of rows][half of 8 columns][2], 16-bit. For integer weights also their sums over groups: [tile of kColumns]
// [group][kColumns].
template <Matrix m>
struct Operand {
  static constexpr int kSlices = m.padded_cols() / 32;
  static constexpr int kGroups = m.has_sums() ? m.padded_cols() / m.group : 0;
  static constexpr int kTileBytes = kSlices * kColumns * 64;
  u8* x;
  float* sums;
  // Rows k and k + 1 of a column: k is even.
  __device__ __forceinline__ u32* pair(int column, int k) const {
    const int lane = column % 8 * 4 + k % 32 / 8, in_tile = column % kColumns;
    return reinterpret_cast<u32*>(x + (u64)(column / kColumns) * kTileBytes + k / 32 * kColumns * 64 + in_tile / 16 * 1024 + k % 8 / 4 * 512 +
                                  lane * 16 + k % 4 / 2 * 8 + in_tile % 16 / 8 * 4);
  }
  __device__ __forceinline__ u16* element(int column, int k) const { return reinterpret_cast<u16*>(pair(column, k & ~1)) + k % 2; }
  __device__ __forceinline__ void put_8(int column, int k8, uint4 v) const {
    u32* to = pair(column, k8 * 8);
    to[0] = v.x, to[2] = v.y, to[128] = v.z, to[130] = v.w;
  }
  __device__ __forceinline__ uint4 get_8(int column, int k8) const {
    const u32* from = pair(column, k8 * 8);
    return make_uint4(ld_cg(from), ld_cg(from + 2), ld_cg(from + 128), ld_cg(from + 130));
  }
  __device__ __forceinline__ float* sum(int column, int group) const {
    return sums + (u64)(column / kColumns * kGroups + group) * kColumns + column % kColumns;
  }
};

// One step along the rows of X, in shared memory: weights [row block][tile], columns as in Operand, sums.
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
  constexpr bool kWholeSteps = m.tiles() % S::kTiles == 0, kWholeTiles = m.row_blocks() % kRowBlocks == 0;
  const int first = step * S::kTiles, tiles = kWholeSteps ? S::kTiles : smaller(S::kTiles, m.tiles() - first);
  constexpr int kVectors = S::kBlockBytes / 16, kCopies = kRowBlocks * kVectors;
  const u8* from = weights + (u64)row_tile * (kRowBlocks * m.row_block_bytes()) + first * m.tile_bytes();
  u8* to = stage + threadIdx.x * 16;
  constexpr bool kEven = kConsumers % kVectors == 0;  // a thread's copies are whole row blocks apart
  if (kEven) from += threadIdx.x / kVectors * m.row_block_bytes() + threadIdx.x % kVectors * 16;
#pragma unroll
  for (int i = 0; i < ceil_div(kCopies, kConsumers); i++) {
    const int at = i * kConsumers + threadIdx.x, block = at / kVectors, vector = at % kVectors;
    if ((kCopies % kConsumers == 0 || at < kCopies) && (kWholeSteps || vector < tiles * m.tile_bytes() / 16) &&
        (kWholeTiles || row_tile * kRowBlocks + block < m.row_blocks()))  // what is not there is computed with and dropped
      cp_async_16(to + i * kConsumers * 16,
                  from + (kEven ? i * (kConsumers / kVectors) * m.row_block_bytes() : block * m.row_block_bytes() + vector * 16));
  }
  constexpr int kTileX = m.tile_cols() * kColumns * 2, kTileSums = S::kTileGroups * kColumns * 4;
  copy<S::kTiles * kTileX>(stage + S::kX, x.x + (u64)column_tile * O::kTileBytes + first * kTileX, tiles * kTileX);
  if constexpr (m.has_sums())
    copy<S::kTiles * kTileSums>(stage + S::kSums, reinterpret_cast<const u8*>(x.sums + column_tile * O::kGroups * kColumns) + first * kTileSums,
                                tiles * kTileSums);
}

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
template <Matrix m, int kTiles>
__device__ __forceinline__ void multiply_slice(float (&sums)[kTiles][kWarpBlocks][2][4], const u8* tile, int slice, const u8* x) {
  Weights w[kWarpBlocks];
#pragma unroll
  for (int b = 0; b < kWarpBlocks; b++) w[b] = load_weights<m>(tile + b * Stage<m>::kBlockBytes, slice);
#pragma unroll
  for (int t = 0; t < kTiles; t++) {
    const uint4 v = *reinterpret_cast<const uint4*>(x + t * 1024), u = *reinterpret_cast<const uint4*>(x + t * 1024 + 512);
#pragma unroll
    for (int b = 0; b < kWarpBlocks; b++) {
      mma<m.bf16()>(sums[t][b][0], {v.x, v.y, v.z, v.w}, w[b].low.x, w[b].low.y);
      mma<m.bf16()>(sums[t][b][1], {v.x, v.y, v.z, v.w}, w[b].high.x, w[b].high.y);
    }
#pragma unroll
    for (int b = 0; b < kWarpBlocks; b++) {
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
template <Matrix m>
__device__ __forceinline__ void multiply_group(Sums& sums, const u8* tile, int group, const u8* x, const float* x_sums) {
  constexpr int kParts = 2, kTiles = kWarpTiles / kParts;
#pragma unroll
  for (int p = 0; p < kParts; p++) {
    float part[kTiles][kWarpBlocks][2][4] = {};
#pragma unroll 2
    for (int s = 0; s < m.group / 32; s++)
      multiply_slice<m>(part, tile, group * (m.group / 32) + s, x + s * kColumns * 64 + p * kTiles * 1024);
#pragma unroll
    for (int b = 0; b < kWarpBlocks; b++) {
      const Scales s = load_scales<m>(tile + b * Stage<m>::kBlockBytes, group);
#pragma unroll
      for (int i = 0; i < kTiles * 8; i++) {
        const int t = i / 8, half = i / 4 % 2, c = i % 4;
        float& to = sums[p * kTiles + t][b][half][c];
        to += s.scale[half][c % 2] * part[t][b][half][c];
        if constexpr (m.has_sums()) to += s.bias[half][c % 2] * x_sums[(p * kTiles + t) * 16 + c / 2 * 8];
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
  const u8* x = stage + S::kX + column * 64 + lane * 16;
  const float* x_sums = reinterpret_cast<const float*>(stage + S::kSums) + column + lane / 4;
#pragma unroll
  for (int t = 0; t < S::kTiles; t++) {
    if (m.tiles() % S::kTiles && t >= tiles) break;
    const u8* tile = weights + t * m.tile_bytes();
    if constexpr (m.group == 0) {
      multiply_slice<m>(sums, tile, 0, x + t * kColumns * 64);
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

// All tiles of Y. use(row, column, low, high) receives rows row, row + 1 and row + 8, row + 9 of column `column`
// < n_columns; row is even.
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
    for (int i = 0; i < kWarpTiles * kWarpBlocks * 2; i++) {
      const int t = i / (2 * kWarpBlocks), b = i / 2 % kWarpBlocks, c = i % 2 * 2, column = first_column + t * 16 + i % 2 * 8 + g;
      float(&low)[4] = sums[t][b][0], (&high)[4] = sums[t][b][1];
      if (row_block + b < m.row_blocks() && column < n_columns)
        use((row_block + b) * 16 + 2 * q, column, make_float2(low[c], low[c + 1]), make_float2(high[c], high[c + 1]));
      low[c] = low[c + 1] = high[c] = high[c + 1] = 0;
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
