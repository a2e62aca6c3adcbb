// How Y = W X is cut for many columns of X: tiles of Y a block, whose weights and columns pass through stages of
// shared memory.
#pragma once
#include "tensor.cuh"
#include "sync.cuh"

namespace gemm {
// A tile of Y, and of it a warp's part. However Y is cut, an element's sum has the same order.
struct Shape {
  int row_blocks, columns;  // row blocks of 16 rows
  int warps_down;           // warps that share their columns
  int warp_columns;         // warps past the last column of the tile only copy
  __device__ constexpr int warp_blocks() const { return row_blocks / warps_down; }
};

// Shared memory: stages, then for bulk copies a barrier for each of them, the barriers' parities, and a word for attention.
constexpr int kMostStages = 8, kStageRoom = kSharedBytes - 8 * (kMostStages + 2);
__device__ __forceinline__ u64* landed_barriers() { return reinterpret_cast<u64*>(dynamic_smem() + kStageRoom); }
__device__ __forceinline__ u32& spare_word() { return *reinterpret_cast<u32*>(landed_barriers() + kMostStages + 1); }
__device__ __forceinline__ u32& kept_parities() { return *reinterpret_cast<u32*>(landed_barriers() + kMostStages); }

constexpr int kOperandColumns = 128;  // of a tile of X in device memory
constexpr Shape kWide{8, kOperandColumns, 4, kOperandColumns * 4 / kWarps};
static_assert(kWarps % kWide.warps_down == 0 && kWide.warp_columns % 32 == 0, "warps must tile 128 rows by 128 columns");

// For few columns the rows are dealt to all blocks, so that all of them read weights, and where there are too few rows for that,
// the columns too. Warps beside each other read the same weights: as many as have 16 columns each, or half of them where
// codes become operands anew each time.
constexpr int kFewColumns = 64;
template <bool kFew, Matrix m>
__device__ constexpr Shape shape() {
  if (!kFew) return kWide;
  constexpr int kMost = 8;
  Shape best{};
  int least = 0;
  for (int columns = kFewColumns; columns >= 16; columns /= 2) {
    for (int blocks = 1; blocks <= kMost; blocks *= 2) {
      const int rounds = ceil_div(ceil_div(m.row_blocks(), blocks) * (kFewColumns / columns), kGrid);
      const int down = smaller(blocks, kWarps * (m.group ? 32 : 16) / columns), cost = rounds * (blocks * 16 + columns / 2);
      const int of_warp = down * columns / kWarps;  // where that is a tile of an mma
      if (least == 0 || cost < least) least = cost, best = {blocks, columns, down, of_warp < 16 ? 16 : of_warp};
    }
  }
  return best;
}

// X as a product reads it: cut along its rows as a matrix's columns, in so many tiles.
struct View {
  const u8* x;
  const float* sums;
  int tiles;
};

// The columns that m is multiplied with, in the order of stages and of fragments, so that a lane reads the four
// words of an mma's operand at once: [tile][slice of 32 rows][16 columns][step of 4 rows][lane][pair of rows]
// [half of 8 columns][2], 16-bit. For integer weights also their sums over groups: [tile][group][column].
template <Matrix m>
struct Operand {
  static constexpr int kSlices = m.padded_cols() / 32;
  static constexpr int kGroups = m.has_sums() ? m.padded_cols() / m.group : 0;
  static constexpr int kTileBytes = kSlices * kOperandColumns * 64;
  u8* x;
  float* sums;
  __device__ __forceinline__ View view() const { return {x, sums, m.tiles()}; }
  // Rows k and k + 1 of a column: k is even.
  __device__ __forceinline__ u32* pair(int column, int k) const {
    const int lane = column % 8 * 4 + k % 32 / 8, in_tile = column % kOperandColumns;
    return reinterpret_cast<u32*>(x + (u64)(column / kOperandColumns) * kTileBytes + k / 32 * kOperandColumns * 64 + in_tile / 16 * 1024 + k % 8 / 4 * 512 +
                                  lane * 16 + k % 4 / 2 * 8 + in_tile % 16 / 8 * 4);
  }
  __device__ __forceinline__ u16* element(int column, int k) const { return reinterpret_cast<u16*>(pair(column, k & ~1)) + k % 2; }
  // Bytes from a row to the one 8 * k8 rows further: from the first eight rows of a slice, or with k8 a multiple of four.
  static __device__ __forceinline__ constexpr int rows_further(int k8) { return k8 / 4 * kOperandColumns * 64 + k8 % 4 * 16; }
  static __device__ __forceinline__ void put_8(u32* to, uint4 v) { to[0] = v.x, to[2] = v.y, to[128] = v.z, to[130] = v.w; }
  static __device__ __forceinline__ uint4 get_8(const u32* from) { return make_uint4(ld_cg(from), ld_cg(from + 2), ld_cg(from + 128), ld_cg(from + 130)); }
  __device__ __forceinline__ float* sum(int column, int group) const {
    return sums + (u64)(column / kOperandColumns * kGroups + group) * kOperandColumns + column % kOperandColumns;
  }
};

// One step along the rows of X, in shared memory: weights [row block][tile], columns as in Operand, sums.
template <Matrix m, Shape s>
struct Stage {
  static constexpr int kTileGroups = m.has_sums() ? m.tile_cols() / m.group : 0;
  // As many of m's columns as let three stages fit: each costs a barrier.
  static __device__ constexpr int tiles() {
    int most = 512 / m.tile_cols();
    while (most > 1 && 3 * most * (s.row_blocks * m.tile_bytes() + s.columns * (m.tile_cols() * 2 + kTileGroups * 4)) > kStageRoom) most /= 2;
    return most;
  }
  static constexpr int kTiles = tiles();
  static constexpr int kBlockBytes = kTiles * m.tile_bytes();
  static constexpr int kX = s.row_blocks * kBlockBytes;  // offsets
  static constexpr int kSums = kX + kTiles * m.tile_cols() * s.columns * 2;
  static constexpr int kBytes = kSums + kTiles * kTileGroups * s.columns * 4;
  static __device__ __forceinline__ constexpr int steps(int tiles) { return ceil_div(tiles, kTiles); }  // of a tile of Y
  static constexpr int kStages = smaller(kMostStages, kStageRoom / kBytes);
  static_assert(kStages >= 2, "copying and computing need a stage each");
};

// The first `count` of kCount runs of kMost bytes, `stride` bytes apart in device memory: of each the first `bytes`, a
// multiple of 16. kOnce: nobody reads them again soon.
template <int kCount, int kMost, bool kOnce = false>
struct Runs {
  u8* to;
  const u8* from;
  int stride, count, bytes;
  // Bulk copies: a warp has every kWarps-th run, from its number on.
  __device__ __forceinline__ u32 bytes_of(int warp) const {
    u32 sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; i += kWarps) sum += i + warp < count ? bytes : 0;
    return sum;
  }
  __device__ __forceinline__ void copy_of(int warp, u64* landed) const {
#pragma unroll
    for (int i = 0; i < kCount; i += kWarps) {
      if (i + warp >= count) continue;
      u8* dst = to + (i + warp) * kMost;
      const u8* src = from + (i + warp) * stride;
      if constexpr (kOnce) cp_async_bulk_once(dst, src, bytes, landed);
      else cp_async_bulk(dst, src, bytes, landed);
    }
  }
  __device__ __forceinline__ void copy_by_all() const {
#pragma unroll
    for (int i = 0; i < ceil_div(kCount * kMost, kConsumers * 16); i++) {
      const int at = (i * kConsumers + threadIdx.x) * 16, run = at / kMost, in_run = at % kMost;
      if (at < count * kMost && in_run < bytes) cp_async_16(to + at, from + run * stride + in_run);
    }
  }
};

// Begins to fill a stage: a lane of each warp by bulk copies, for each takes a while to issue, or all threads.
template <class... Parts>
__device__ __forceinline__ void begin_copies(u64* landed, const Parts&... parts) {
  if constexpr (kBulkCopy) {
    if (threadIdx.x % 32) return;
    const int warp = threadIdx.x / 32;
    mbarrier_arrive_expect_tx(landed, (parts.bytes_of(warp) + ...));
    (parts.copy_of(warp, landed), ...);
  } else {
    (parts.copy_by_all(), ...);
    cp_async_commit_group();
  }
}

// Before the first pipeline; some barrier of the block must come between.
__device__ __forceinline__ void init_pipelines() {
  if (!kBulkCopy || threadIdx.x != 0) return;
#pragma unroll 1
  for (int s = 0; s < kMostStages; s++) mbarrier_init(landed_barriers() + s, kWarps);
  kept_parities() = 0;
  fence_mbarrier_init();
}

struct Nothing {
  __device__ __forceinline__ void operator()() const {}
};

// Runs `count` stages through shared memory: load(stage, i, landed) calls begin_copies(), use(stage, i) reads what landed.
// Nobody may use that memory before, and nobody does after. meanwhile() is called while the first stages are on their way; what
// it leaves in other shared memory is published before the first use().
template <int kStages, int kBytes, class Load, class Use, class Meanwhile = Nothing>
__device__ __forceinline__ void pipeline(u8* memory, int count, Load load, Use use, Meanwhile meanwhile = {}) {
  u64* const landed = landed_barriers();
  u32 parities = kBulkCopy ? kept_parities() : 0;  // a bit for each stage
  const auto fill = [&](int stage, int i) {
    if (i < count) load(memory + stage * kBytes, i, landed + stage);
    else if (!kBulkCopy) cp_async_commit_group();  // groups are counted
  };
  if (kBulkCopy && threadIdx.x % 32 == 0) fence_proxy_async_global();  // the copies see what the grid's barrier published
#pragma unroll 1
  for (int i = 0; i < kStages - 1; i++) fill(i, i);
  meanwhile();
  int reading = 0, filling = kStages - 1;
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    if constexpr (kBulkCopy) {
      while (!mbarrier_try_wait_parity(landed + reading, parities >> reading & 1)) {
      }
      parities ^= 1u << reading;
    } else {
      cp_async_wait_group<kStages - 2>();
    }
    sync_consumers();  // publishes stage i; stage i - 1 may be overwritten
    fill(filling, i + kStages - 1);
    use(memory + reading * kBytes, i);
    if (++reading == kStages) reading = 0;
    if (++filling == kStages) filling = 0;
  }
  if (kBulkCopy && count > 0 && threadIdx.x == 0) kept_parities() = parities;  // all have read them
  fence_proxy_async_shared();  // later copies come after what threads wrote
  sync_consumers();  // all stages may be overwritten
}

// Where a block is on its way through its tiles. Neighbouring blocks have tiles that share their weights.
struct Place {
  int column_tiles, tile = blockIdx.x, step = 0, row_tile, column_tile;
  __device__ __forceinline__ explicit Place(int column_tiles) : column_tiles(column_tiles) { find(); }
  __device__ __forceinline__ void next(int steps_of_a_tile) {
    if (++step < steps_of_a_tile) return;
    step = 0, tile += kGrid;
    find();
  }

 private:
  __device__ __forceinline__ void find() { row_tile = tile / column_tiles, column_tile = tile - row_tile * column_tiles; }
};

// What is not there is computed with and dropped: rows past the last one, columns from n_columns on. Of few columns
// only those that are there are copied.
template <Matrix m, Shape s>
__device__ __forceinline__ void load_stage(u8* stage, u64* landed, const u8* weights, const View& x, const Place& place, int n_columns) {
  using S = Stage<m, s>;
  constexpr int kSlices = m.tile_cols() / 32, kSliceBytes = kOperandColumns * 64;  // slices of a tile
  const int first = place.step * S::kTiles, tiles = smaller(S::kTiles, x.tiles - first), row_block_bytes = x.tiles * m.tile_bytes();
  const int row_block = place.row_tile * s.row_blocks, column = place.column_tile * s.columns;
  constexpr bool kWhole = s.columns == kOperandColumns;  // slices lie side by side
  const int columns = kWhole ? s.columns : smaller(s.columns, (n_columns - column + 15) / 16 * 16);
  const int tile = column / kOperandColumns * x.tiles + first, in_tile = column % kOperandColumns;
  // Of few columns: who else reads these weights does so at the same time.
  const u8* begin = weights + (u64)row_block * row_block_bytes + first * m.tile_bytes();
  const Runs<s.row_blocks, S::kBlockBytes, !kWhole> rows{stage, begin, row_block_bytes, smaller(s.row_blocks, m.row_blocks() - row_block),
                                                         tiles * m.tile_bytes()};
  const u8* from = x.x + (u64)tile * kSlices * kSliceBytes + in_tile * 64;
  constexpr int kRuns = kWhole ? 1 : S::kTiles * kSlices, kRunBytes = (kWhole ? S::kTiles * kSlices : 1) * s.columns * 64;
  const Runs<kRuns, kRunBytes> slices{stage + S::kX, from, kSliceBytes, kWhole ? 1 : tiles * kSlices,
                                      (kWhole ? tiles * kSlices : 1) * columns * 64};
  if constexpr (m.has_sums()) {
    const float* sums = x.sums + tile * S::kTileGroups * kOperandColumns + in_tile;
    const Runs<S::kTiles * S::kTileGroups, s.columns * 4> groups{stage + S::kSums, reinterpret_cast<const u8*>(sums), kOperandColumns * 4,
                                                                 tiles * S::kTileGroups, columns * 4};
    begin_copies(landed, rows, slices, groups);
  } else {
    begin_copies(landed, rows, slices);
  }
}
}  // namespace gemm
