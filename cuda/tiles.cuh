// How Y = W X is cut for many columns of X: tiles of Y of 128 rows by 128 columns a block, whose weights and
// columns pass through stages of shared memory, which all threads fill with cp.async.
#pragma once
#include "tensor.cuh"
#include "sync.cuh"

namespace gemm {
constexpr int kColumns = 128;                                // of a tile of Y
constexpr int kRowBlocks = 8;                                // of 16 rows: of a tile of Y
constexpr int kWarpBlocks = 2;                               // row blocks of a warp
constexpr int kWarpsDown = kRowBlocks / kWarpBlocks;         // warps that share their columns
constexpr int kWarpColumns = kColumns * kWarpsDown / kWarps;
static_assert(kWarps % kWarpsDown == 0 && kWarpColumns % 32 == 0, "warps must tile 128 rows by 128 columns");

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
}  // namespace gemm
