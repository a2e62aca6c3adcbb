// y = W x for 1 to kColumns columns of x: the row blocks of W are dealt to the blocks of the grid, the
// columns of W to the warps of a block, whose partial sums meet in shared memory.
#pragma once
#include "dequant.cuh"
#include "pipeline.cuh"

// Row blocks of a matrix that are a team's: first, first + number of teams, ... A team is one block, or kParts
// blocks that have a part of the columns each. The deal goes on from matrix to matrix, so that remainders even
// out over the step.
struct Deal {
  int place = blockIdx.x;  // this block's in the queue for the next row block
  struct Share { int first, count, part; };
  __device__ __forceinline__ Share take(u32 row_blocks, u32 parts = 1) {
    const u32 teams = kGrid / parts, first = u32(place) / parts, part = u32(place) % parts, rest = row_blocks % teams;
    place -= int(rest * parts);
    if (place < 0) place += kGrid;
    return {int(first), int(row_blocks / teams + (first < rest)), int(part)};
  }
};

// The activations that a matrix is multiplied with: panels of columns that fit into shared memory. Where a matrix is in
// parts, a block has one panel only, and its team adds up the sums.
template <class Map, Matrix m>
struct Activations {
  static constexpr int kParts = Map::kColumns == 1 ? 1 : m.parts;
  static constexpr int kPanelTiles = smaller(Map::kPanelCols / m.tile_cols(), ceil_div(m.tiles(), kParts));
  static constexpr int kPanels = ceil_div(m.tiles(), kPanelTiles);
  static constexpr int kPanelsOfBlock = kParts > 1 ? 1 : kPanels;  // else each block of a team has one
  static_assert(kParts == 1 || kPanels == kParts, "a part is a panel");
  static __device__ __forceinline__ constexpr int tiles(int panel) {
    return kPanels == 1 ? m.tiles() : smaller(kPanelTiles, m.tiles() - panel * kPanelTiles);
  }

  // Scratch begins with a panel's activations [kColumns][columns of the panel], 16-bit, then their sums over groups
  // [kColumns][kSums], fp32.
  static constexpr int kStride = (kPanelTiles * m.tile_cols() * 2 + 127) / 128 * 128 + 64;  // two columns meet different banks
  static constexpr int kSums = m.has_sums() ? kPanelTiles * m.tile_cols() / m.group : 0;
  static constexpr int kSumsAt = Map::kColumns * kStride, kEnd = (kSumsAt + 4 * Map::kColumns * kSums + 15) / 16 * 16;
  static __device__ __forceinline__ u8* x(int column) { return Shared<Map>::scratch() + column * kStride; }
  static __device__ __forceinline__ float* sums(int column) { return reinterpret_cast<float*>(Shared<Map>::scratch() + kSumsAt) + column * kSums; }
};
template <class Map, Matrix m>
using ActivationsOf = Activations<Map, m.columns_and_parts()>;

// How a matrix is walked: windows of row blocks whose partial sums fit in shared memory, in each window the panels,
// in each panel row block after row block.
template <class Map, Matrix m>
struct Walk : ActivationsOf<Map, m> {
  using Base = ActivationsOf<Map, m>;
  using Base::kParts, Base::kPanelTiles, Base::tiles;
  static constexpr int kTeams = kGrid / kParts;
  static_assert(kGrid % kParts == 0, "teams are of one size");
  static __device__ __forceinline__ constexpr int chunks(int panel) { return ceil_div(tiles(panel), m.chunk_tiles); }
  static constexpr int kChunkBytes = m.chunk_tiles * m.tile_bytes();
  // Copies in flight: few at first, while blocks exchange results, which wait behind them; later more.
  static constexpr int kLater = (Map::kStages + kWarps) / chunks(0);  // row blocks: consumers have their activations by then
  static constexpr int kInFlight = copies_in_flight<Map>(kInFlightBytes, kChunkBytes);
  static constexpr int kLaterInFlight = copies_in_flight<Map>(kLaterInFlightBytes, kChunkBytes);

  // Scratch, behind the activations: partial sums [kWindow][kSlots][16][kColumns], fp32, up to Map::kReduce. Chunks of a
  // row block that are kSlots apart are of one warp, which adds them up; others have a slot of their own.
  static constexpr int kSlots = smaller(kWarps, ceil_div(kPanelTiles, m.chunk_tiles));
  static __device__ __forceinline__ constexpr int slots(int panel) { return smaller(kSlots, chunks(panel)); }  // that it uses
  static constexpr int kWindow = smaller(kConsumers / 8, (Map::kReduce - Base::kEnd) / (kSlots * 16 * Map::kColumns * 4));
  static_assert(kWindow >= 1, "shared_map left no room for partial sums");
};

// A walk as the producer needs it: as data, so that one loop, compiled once, streams all matrices.
struct Route {
  u64 offset;                                                // of the matrix
  int row_block_bytes, panel_bytes, chunk_bytes;
  int in_flight, later_in_flight, later;                     // copies; from which row block of a share on
  int row_blocks, parts, window, panels;                     // panels: those of a block
};
template <class Map, Matrix m>
__device__ constexpr Route route() {
  using W = Walk<Map, m>;
  return {m.offset, m.row_block_bytes(), W::kPanelTiles * m.tile_bytes(), W::kChunkBytes,
          W::kInFlight, W::kLaterInFlight, W::kLater,
          m.row_blocks(), W::kParts, W::kWindow, W::kPanelsOfBlock};
}

template <class Map>
__device__ __forceinline__ void stream_matrix(Streamer<Map>& to, Deal& deal, const u8* base, const Route& r) {
  const Deal::Share share = deal.take(r.row_blocks, r.parts);
  const int teams = kGrid / r.parts;
#pragma unroll 1
  for (int window = 0; window < share.count; window += r.window)
#pragma unroll 1
    for (int panel = share.part; panel < share.part + r.panels; panel++)
#pragma unroll 1
      for (int b = window; b < smaller(window + r.window, share.count); b++) {
        const int begin = panel * r.panel_bytes;
        const u8* src = base + r.offset + (u64)(share.first + b * teams) * r.row_block_bytes + begin;
        to.copy(src, smaller(r.panel_bytes, r.row_block_bytes - begin), r.chunk_bytes, b < r.later ? r.in_flight : r.later_in_flight);
      }
}

// acc[16 rows x 8 columns] += one tile times its columns of x. acc is in units that finish() restores.
template <class Map, Matrix m>
__device__ __forceinline__ void multiply_tile(float (&acc)[4], float (&bias_acc)[4], const u8* tile, const u8* x, const float* sums0,
                                              const float* sums1) {
  const int lane = thread_index() % 32;
  if constexpr (m.group == 0) {
    const uint4* rows = reinterpret_cast<const uint4*>(tile);
    const uint4 lo = rows[lane], hi = rows[32 + lane], b = *reinterpret_cast<const uint4*>(x);
    mma<m.bf16()>(acc, {lo.x, hi.x, lo.y, hi.y}, b.x, b.y);
    mma<m.bf16()>(bias_acc, {lo.z, hi.z, lo.w, hi.w}, b.z, b.w);
  } else {
    constexpr int kSlices = m.group / 32;  // 32-column slices of a group
    const uint4* codes = reinterpret_cast<const uint4*>(tile) + lane;
    uint4 w;  // of two slices (int4) or one
#pragma unroll
    for (int group = 0; group < m.tile_cols() / m.group; group++) {
      float even[4] = {}, odd[4] = {};
#pragma unroll
      for (int i = 0; i < kSlices; i++) {
        const int slice = group * kSlices + i;
        const uint4 b = *reinterpret_cast<const uint4*>(x + slice * 64);
        if constexpr (m.type == Type::kInt4) {
          if (slice % 2 == 0) w = codes[slice / 2 * 32];
          mma<false>(even, int4_fragment(slice % 2 ? w.z : w.x), b.x, b.y);
          mma<false>(odd, int4_fragment(slice % 2 ? w.w : w.y), b.z, b.w);
        } else {
          w = codes[slice * 32];
          constexpr bool kInt = m.type == Type::kInt8;
          mma<false>(even, kInt ? int8_fragment(w.x, w.z) : fp8_fragment(w.x, w.z), b.x, b.y);
          mma<false>(odd, kInt ? int8_fragment(w.y, w.w) : fp8_fragment(w.y, w.w), b.z, b.w);
        }
      }
      const u8* scales = tile + m.code_bytes() + group * (m.type == Type::kInt4 ? 64 : 32);
      float s0, s1, t0 = 0, t1 = 0;
      if constexpr (m.type == Type::kInt4) {
        const uint2 v = *reinterpret_cast<const uint2*>(scales + lane / 4 * 8);
        s0 = cvt_f32_f16(v.x & 0xffff), t0 = cvt_f32_f16(v.x >> 16), s1 = cvt_f32_f16(v.y & 0xffff), t1 = cvt_f32_f16(v.y >> 16);
      } else {
        const u32 v = *reinterpret_cast<const u32*>(scales + lane / 4 * 4);
        s0 = cvt_f32_f16(v & 0xffff), s1 = cvt_f32_f16(v >> 16);
        if constexpr (m.type == Type::kInt8) t0 = -128.0f * s0, t1 = -128.0f * s1;
      }
#pragma unroll
      for (int c = 0; c < (Map::kColumns == 1 ? 1 : 2); c++) {
        acc[c] += s0 * (even[c] + odd[c]);
        acc[2 + c] += s1 * (even[2 + c] + odd[2 + c]);
        if constexpr (m.has_sums()) {
          const float sum = (c ? sums1 : sums0)[group];
          bias_acc[c] += t0 * sum;
          bias_acc[2 + c] += t1 * sum;
        }
      }
    }
  }
}

template <Matrix m>
__device__ __forceinline__ float finish(float acc, float bias_acc, bool high_row) {
  if constexpr (m.type == Type::kInt4) return acc * (high_row ? kSubnormal / 16 : kSubnormal) + bias_acc;
  else if constexpr (m.type == Type::kInt8) return acc * kSubnormal + bias_acc;
  else return acc + bias_acc;
}

// One chunk of one row block into partial sums [16 rows][kColumns]: the first there, or added to what is there.
template <class Map, Matrix m>
__device__ __forceinline__ void multiply_chunk(float* partial, bool first, const u8* tiles, int first_tile, int count) {
  const int lane = thread_index() % 32, g = lane / 4, q = lane % 4;
  using C = ActivationsOf<Map, m>;
  const int column = Map::kColumns == 1 ? 0 : g;  // with one column all eight columns of the mma are that one
  const u8* x = C::x(column) + first_tile * m.tile_cols() * 2 + q * 16;
  constexpr int kTileGroups = m.group ? m.tile_cols() / m.group : 0;
  const float* sums0 = C::sums(Map::kColumns == 1 ? 0 : 2 * q) + first_tile * kTileGroups;
  const float* sums1 = C::sums(Map::kColumns == 1 ? 0 : 2 * q + 1) + first_tile * kTileGroups;
  float acc[4] = {}, bias_acc[4] = {};
  constexpr int kUnroll = Map::kColumns == 1 && (m.group == 0 || m.tile_cols() == 64) ? 4 : 2;
#pragma unroll kUnroll
  for (int t = 0; t < count; t++)
    multiply_tile<Map, m>(acc, bias_acc, tiles + t * m.tile_bytes(), x + t * m.tile_cols() * 2, sums0 + t * kTileGroups, sums1 + t * kTileGroups);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = g + i / 2 * 8, col = Map::kColumns == 1 ? 0 : 2 * q + i % 2;
    if (Map::kColumns == 1 && (q != 0 || i % 2)) continue;
    float& sum = partial[row * Map::kColumns + col];
    sum = (first ? 0.0f : sum) + finish<m>(acc[i], bias_acc[i], i / 2);
  }
}

struct Nothing {};
struct FetchNothing {
  __device__ __forceinline__ Nothing operator()(int, int) const { return {}; }
};

// The sums of a window, one of these a pair of rows and column: rows `row` and `row + 8`.
template <class Map>
struct WindowSums {
  static constexpr int kOfBlock = 8 * Map::kColumns;  // of a row block
  // Of what the block's warps left in `slots` of kSlots.
  template <int kSlots>
  static __device__ __forceinline__ float2 of_warps(const float* partials, int slots, int i) {
    const float* slot = partials + i / kOfBlock * kSlots * 2 * kOfBlock + i % kOfBlock;
    float2 sum = make_float2(0, 0);
    for (int s = 0; s < slots; s++) sum.x += slot[s * 2 * kOfBlock], sum.y += slot[s * 2 * kOfBlock + kOfBlock];
    return sum;
  }
  // Of what the team's blocks left, always in the same order.
  template <int kParts>
  static __device__ __forceinline__ float2 of_team(const float2* parts, int i) {
    float2 sum = make_float2(0, 0), v[kParts];
#pragma unroll
    for (int part = 0; part < kParts; part++) v[part] = ld_cg(parts + part * kOfBlock + i);
#pragma unroll
    for (int part = 0; part < kParts; part++) sum.x += v[part].x, sum.y += v[part].y;
    return sum;
  }
};

// Leaves this block's sums of a window to its team, and tells whether it was the last one to do so.
// [row block][part][sums of a row block]
template <class Map, Matrix m>
__device__ __forceinline__ bool completes_team(const StepArgs& args, int first, int part, int count, const float* partials) {
  using W = Walk<Map, m>;
  constexpr int kOfBlock = WindowSums<Map>::kOfBlock;
  const Workspace work(args);
#pragma unroll 1
  for (int i = thread_index(); i < count; i += kConsumers)
    work.team_sums()[((first + i / kOfBlock * W::kTeams) * W::kParts + part) * kOfBlock + i % kOfBlock] = WindowSums<Map>::template of_warps<W::kSlots>(partials, W::slots(part), i);
  u32* last = reinterpret_cast<u32*>(Shared<Map>::team());
  sync_consumers();  // the block's sums are complete
  if (thread_index() == 0)  // publishes them, sees the others', and counts from 0 again after the last
    *last = atom_inc_acq_rel_gpu(work.team_arrivals() + first, W::kParts - 1) == W::kParts - 1;
  sync_consumers();  // publishes who goes on
  return *last;
}

// The consumers' half of a matrix product. load_panel(panel, first) brings activations into shared memory (and
// synchronises); use(row, column, low, high, lanes, fetched) receives rows `row` and `row + 8` of W x, in
// all lanes of the mask `lanes` together. It also gets what fetch(row, column) returned, mostly before the
// product, so that reads of global memory are not waited for.
template <class Map, Matrix m, class LoadPanel, class Use, class Fetch = FetchNothing>
__device__ __forceinline__ void multiply_matrix(Consumer<Map>& consumer, Deal& deal, int n_columns, LoadPanel load_panel, Use use,
                                                Fetch fetch = FetchNothing()) {
  using W = Walk<Map, m>;
  constexpr int kColumns = Map::kColumns, kOfBlock = WindowSums<Map>::kOfBlock;
  const Deal::Share share = deal.take(m.row_blocks(), W::kParts);
  float* partials = reinterpret_cast<float*>(Shared<Map>::scratch() + W::kEnd);
  consumer.profile.mark(kBegin);
  // With one column, who has no rows must not read: nobody waits for it, so what it would read may be
  // overwritten already. With several all must, to take note of norms.
  const bool reads = kColumns > 1 ? W::kPanelsOfBlock == 1 || share.count == 0 : W::kPanelsOfBlock == 1 && share.count > 0;
  if (reads) load_panel(share.part, true);
  consumer.profile.mark(kLoaded);
#pragma unroll 1
  for (int window = 0; window < share.count; window += W::kWindow) {
    const int blocks = smaller(W::kWindow, share.count - window), first = share.first + window * W::kTeams;
    const auto row_of = [&](int i) { return (first + i / kOfBlock * W::kTeams) * 16 + i / kColumns % 8; };
    static_assert(kColumns > 1 || W::kWindow * 8 <= kConsumers, "with one column a thread has at most one row to fetch for");
    const int place = smaller(thread_index(), blocks * kOfBlock - 1);
    const auto early = fetch(row_of(place), place % kColumns);  // by all, so that nothing waits for it
#pragma unroll 1
    for (int i = 0; i < W::kPanelsOfBlock; i++) {
      const int panel = share.part + i;
      if (W::kPanelsOfBlock > 1) load_panel(panel, window == 0 && i == 0);
      const int chunks = W::chunks(panel), tiles = W::tiles(panel);
      const bool first_panel = W::kPanelsOfBlock == 1 || i == 0;
      consumer.take(blocks * chunks, [&](int i, const u8* data) {
        const int chunk = i % chunks, first_tile = chunk * m.chunk_tiles;
        float* partial = partials + (i / chunks * W::kSlots + chunk % W::kSlots) * 16 * kColumns;
        multiply_chunk<Map, m>(partial, first_panel && chunk < W::kSlots, data, first_tile, smaller(m.chunk_tiles, tiles - first_tile));
      });
    }
    sync_consumers();  // publishes the partial sums to the block's consumers
    consumer.profile.mark(kStreamed);
    bool mine_to_use = true;
    if constexpr (W::kParts > 1) mine_to_use = completes_team<Map, m>(consumer.args, first, share.part, blocks * kOfBlock, partials);
#pragma unroll 1
    for (int i = thread_index(); mine_to_use && i < blocks * kOfBlock; i += kConsumers) {
      const int column = i % kColumns;
      // Callers of use(): with several columns always four rows, with one from lane 0 on.
      const int rest = blocks * kOfBlock - i / 32 * 32;
      const u32 lanes = kColumns == 8 ? 0x01010101u * ((1u << n_columns) - 1) : rest >= 32 ? 0xffffffffu : (1u << rest) - 1;
      if (column >= n_columns) continue;
      float2 sum;
      if constexpr (W::kParts > 1)
        sum = WindowSums<Map>::template of_team<W::kParts>(
            Workspace(consumer.args).team_sums() + (u64)(first + i / kOfBlock * W::kTeams) * W::kParts * kOfBlock, i % kOfBlock);
      else sum = WindowSums<Map>::template of_warps<W::kSlots>(partials, W::slots(0), i);
      use(row_of(i), column, sum.x, sum.y, lanes, kColumns == 1 || i == place ? early : fetch(row_of(i), column));
    }
    sync_consumers();  // the partial sums may be overwritten
  }
  consumer.profile.mark(kWritten);
}
