// Attention over KV heads x splits of the past. All query heads of a KV head meet each K and V byte in
// shared memory, once; the past comes through the ring, the step's own positions from the qkv buffer.
#pragma once
#include "attend.cuh"

namespace attention {
constexpr int kChunkBlocks = kStageBytes / kBlockBytes;
static_assert(kChunkBlocks >= 1, "a stage must hold a block of 16 positions of K and V");

struct Unit { int kv_head, row_tile, split; };

// The work: query rows of a KV head in tiles of kRows, times splits of the past.
template <class Map>
struct Plan {
  int n_columns, position, first_block, blocks, row_tiles, splits;
  __device__ Plan(int n_columns, int position, int window) : n_columns(n_columns), position(position) {
    const int oldest = window ? position - window + 1 : 0;  // of what column 0 sees
    first_block = oldest > 0 ? oldest / 16 : 0;
    blocks = ceil_div(position, 16) - first_block;
    if (blocks < 0) blocks = 0;
    row_tiles = ceil_div(kGroup * n_columns, kRows);
    const int room = kGrid / (model::kKvHeads * row_tiles);
    splits = smaller(room < kMaxSplits ? room : kMaxSplits, ceil_div(blocks, kSplitBlocks));
    if (splits < 1) splits = 1;
  }
  __device__ __forceinline__ int rows(const Unit& u) const { return smaller(kRows, kGroup * n_columns - u.row_tile * kRows); }
  __device__ __forceinline__ int units() const { return model::kKvHeads * row_tiles * splits; }
  __device__ __forceinline__ int split_begin(int split) const { return first_block + int(u32(blocks * split) / u32(splits)); }
};

template <class Map>
__device__ __forceinline__ Unit unit_of(const Plan<Map>& plan, int index) {
  const u32 team = u32(index) / u32(plan.splits);
  return {int(team / u32(plan.row_tiles)), int(team % u32(plan.row_tiles)), int(index - team * plan.splits)};
}

// The last block may hold positions of this step, which prepare() writes at the same time: whatever the
// copy sees of them is finite and masked.
template <class Map>
__device__ void stream_past(Streamer<Map>& to, Deal& deal, const Plan<Map>& plan, const u8* cache, int max_blocks) {
  constexpr int kChunkBytes = kChunkBlocks * kBlockBytes, kInFlight = copies_in_flight<Map>(kInFlightBytes, kChunkBytes);
  const Deal::Share share = deal.take(plan.units());
#pragma unroll 1
  for (int i = 0; i < share.count; i++) {
    const Unit u = unit_of(plan, share.first + i * kGrid);
    const int begin = plan.split_begin(u.split), end = plan.split_begin(u.split + 1);
    to.copy(cache + block_offset(u.kv_head, begin, max_blocks), (end - begin) * kBlockBytes, kChunkBytes, kInFlight);
  }
}

// Shared memory of a unit.
template <class Map>
struct Scratch {
  static constexpr int kSlotRows = Map::kColumns == 1 ? smaller(kRows, kGroup) : kRows;
  static constexpr int kStride = kHeadDim + 4;  // of outputs: rows that lanes write at the same time meet different banks
  u8 *queries, *fresh;      // [kRows][kQueryStride]; one block of positions: the step's own K and V
  float *outputs, *sums;    // [kSlots][kSlotRows][kStride]; [kSlots][kSlotRows][2]: maximum and sum
  static __device__ __forceinline__ Scratch here() {
    u8* base = Shared<Map>::scratch();
    float* outputs = reinterpret_cast<float*>(base + kRows * kQueryStride + kBlockBytes);
    return {base, base + kRows * kQueryStride, outputs, outputs + Map::kSlots * kSlotRows * kStride};
  }
};

// Rotations of the pairs of a head for each column, the same in all layers: computed once.
template <class Map>
struct Turns {
  static __device__ __forceinline__ Rotation* kept() { return reinterpret_cast<Rotation*>(Shared<Map>::scratch() + Map::kTurns); }
  static __device__ __forceinline__ void keep(const StepArgs& args) {
#pragma unroll 1
    for (int i = thread_index(); i < args.n_columns * (kHeadDim / 2); i += kConsumers)
      kept()[i] = rotation(args.rope_turns[i % (kHeadDim / 2)], args.position + i / (kHeadDim / 2), args.rope_scale);
    // A block without rows of W_qkv comes to no other barrier before it needs them.
    sync_consumers();  // publishes the rotations
  }
  static __device__ __forceinline__ Rotation at(int column, int d) { return kept()[column * (kHeadDim / 2) + d]; }
};

template <class Map>
using Qkv = Floats<Map, (model::kHeads + 2 * model::kKvHeads) * kHeadDim>;

template <class Map>
using Attended = Halves<Map, model::kHeads * kHeadDim>;

// Queries of the unit's row tile, and, for the last split, the step's own K and V: also into the cache.
// Warps take rows in turn: those of the queries, then the columns' rows of K, then of V. Query rows that
// are not there keep what lies in shared memory: their columns of the products are never read.
template <class Map>
__device__ void prepare(Exchange<Map>& exchange, const Plan<Map>& plan, const Unit& u, const Qkv<Map>& qkv,
                        const float* q_norm, const float* k_norm, u8* cache) {
  const Scratch<Map> s = Scratch<Map>::here();
  const int n = plan.n_columns;
  const bool last = u.split == plan.splits - 1;
  const int rows = plan.rows(u), end = rows + (last ? 2 * n : 0);
  if (last) {
#pragma unroll 1
    for (int i = thread_index(); i < kBlockBytes / 16; i += kConsumers) reinterpret_cast<uint4*>(s.fresh)[i] = make_uint4(0, 0, 0, 0);
    sync_consumers();  // the block of fresh positions is zero
  }
  const auto column_of = [&](int r) { return r < rows ? (u.row_tile * kRows + r) / kGroup : r - rows - (r < rows + n ? 0 : n); };
  const auto fetch = [&](int r, Head& head) {
    const int at = r < rows ? u.kv_head * kGroup + (u.row_tile * kRows + r) % kGroup
                            : model::kHeads + (r < rows + n ? 0 : model::kKvHeads) + u.kv_head;
    int values[Head::kValues];
#pragma unroll
    for (int i = 0; i < Head::kValues; i++) values[i] = Head::dim(i) < 0 ? -1 : at * kHeadDim + Head::dim(i);
    qkv.get(exchange, column_of(r), values, head.v);
  };
  const auto finish = [&](int r, Head& head) {
    const bool query = r < rows, value = r >= rows + n;
    const int column = column_of(r), position = plan.position + column;
    if (!value) head.norm_and_turn(query ? q_norm : k_norm, [&](int i) { return Turns<Map>::at(column, Head::dim(i)); });
    if (query) return head.each([&](int d, float v) { reinterpret_cast<u16*>(s.queries + r * kQueryStride)[d] = rounded(v); });
    // A step that ends a prompt leaves what prefill wrote: the same bits, however long a prompt is.
    const bool writes = u.row_tile == 0 && !exchange.args.resumed;
    u8* block = writes ? cache + block_offset(u.kv_head, position / 16, exchange.args.max_blocks) : nullptr;
    head.each([&](int d, float v) {
      const u16 bits = rounded(v);
      *reinterpret_cast<u16*>(s.fresh + (value ? v_offset(column, d) : k_offset(column, d))) = bits;
      if (block) *reinterpret_cast<u16*>(block + (value ? v_offset(position % 16, d) : k_offset(position % 16, d))) = bits;
    });
  };
  each_row<Map::kColumns == 1 ? 1 : 3>(thread_index() / 32, kWarps, end, fetch, finish);
}

// Writes what this warp knows into a slot, merged with what an earlier round left there.
template <class Map>
__device__ __forceinline__ void leave(const Running& run, int slot, bool merge) {
  const Scratch<Map> s = Scratch<Map>::here();
  const int g = thread_index() % 32 / 4, q = thread_index() % 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row_in_slot = 2 * q + i, row = slot * s.kSlotRows + row_in_slot;
    float sum = sum_of_row(run.sum[i]), top = run.maximum[i], mine = 1, other = 0;
    const bool kept = row_in_slot < s.kSlotRows;
    if (merge && kept) {
      const float theirs = s.sums[row * 2], base = fmaxf(top, theirs);
      if (base != -kInfinity) mine = ex2_approx(top - base), other = ex2_approx(theirs - base);
      sum = sum * mine + s.sums[row * 2 + 1] * other;
      top = base;
    }
    __syncwarp();  // all lanes of the row have read its sums
    if (!kept) continue;
    float* at = s.outputs + row * s.kStride + g;
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; d++) {
      const float value = run.out[d / 2][d % 2 * 2 + i];
      at[d * 8] = merge ? value * mine + at[d * 8] * other : value;
    }
    if (g == 0) s.sums[row * 2] = top, s.sums[row * 2 + 1] = sum;
  }
}

// This warp's part of the unit: its chunks of the past and, for one warp of the last split, the fresh positions.
template <class Map>
__device__ void attend_all(Consumer<Map>& consumer, const Plan<Map>& plan, const Unit& u, int window) {
  const Scratch<Map> s = Scratch<Map>::here();
  Running run;
  const auto column_of = [&](int row) { return (u.row_tile * kRows + row) / kGroup; };
  const int begin = plan.split_begin(u.split), end = plan.split_begin(u.split + 1), chunks = ceil_div(end - begin, kChunkBlocks);
  // Whose turn it is after the last chunk has had the fewest of them.
  bool fresh = u.split == plan.splits - 1 && thread_index() / 32 == (consumer.begin + chunks) % kWarps;
  Seen seen = Seen::of([&](int row) { return plan.position + column_of(row); }, plan.position - 1, window);
  const u8* chunk = nullptr;  // the ring's
  const u8* blocks = nullptr;
  int first = 0, count = 0;   // the position of the first block, and how many they are
#pragma unroll 1
  while (true) {  // over blocks, so that attend() is compiled once
    if (count == 0) {
      if (chunk) consumer.release();
      const int i = consumer.next - consumer.begin;
      chunk = consumer.await(chunks);
      if (chunk) {
        blocks = chunk, first = (begin + i * kChunkBlocks) * 16, count = smaller(kChunkBlocks, end - begin - i * kChunkBlocks);
      } else if (fresh) {
        blocks = s.fresh, first = 0, count = 1, fresh = false;
        seen = Seen::of(column_of, plan.n_columns - 1, window);
      } else {
        break;
      }
    }
    attend<1>(run, blocks, 1, s.queries, first, seen);
    blocks += kBlockBytes, first += 16, count--;
  }
  consumer.begin += chunks;
  const int slot = thread_index() / 32 % Map::kSlots, turn = thread_index() / 32 / Map::kSlots;
#pragma unroll 1
  for (int round = 0; round < kWarps / Map::kSlots; round++) {
    if (turn == round) leave<Map>(run, slot, round > 0);
    sync_consumers();  // publishes this round's slots
  }
}

// A partial result over part of the past: maximum, sum, and the weighted values of kDims neighbouring dims.
constexpr int kDims = 4;
struct Part {
  float maximum = -kInfinity, sum = 0, value[kDims] = {};
  static __device__ __forceinline__ Part of(float maximum, float sum, const uint4& v) {
    return {maximum, sum, {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)}};
  }
};

// Parts 0 to count - 1 as one, in order, several at a time so that their reads overlap: as many as the
// registers of the kernel allow.
template <class Map, class Get>
__device__ __forceinline__ Part combined(int count, Get get) {
  constexpr int kAtOnce = Map::kColumns == 1 ? 8 : 4;
  Part all;
#pragma unroll 1
  for (int first = 0; first < count; first += kAtOnce) {
    Part parts[kAtOnce];
    float top = all.maximum;
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
      if (first + i < count) parts[i] = get(first + i);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) top = fmaxf(top, parts[i].maximum);
    if (top == -kInfinity) continue;
    const float before = ex2_approx(all.maximum - top);
    all.maximum = top;
    all.sum *= before;
#pragma unroll
    for (int j = 0; j < kDims; j++) all.value[j] *= before;
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const float weight = ex2_approx(parts[i].maximum - top);
      all.sum += parts[i].sum * weight;
#pragma unroll
      for (int j = 0; j < kDims; j++) all.value[j] += parts[i].value[j] * weight;
    }
  }
  return all;
}

// What the block's warps left, and with several splits all of them, by the block that arrives last: finish(row, dim, part)
// for each row of the unit and all kDims dims from `dim` on.
template <class Map, class Finish>
__device__ __forceinline__ void combine(const Exchange<Map>& exchange, const Plan<Map>& plan, const Unit& u, Finish finish) {
  // partials: [kv head][row tile][split][kRows][maximum, sum, 0, 0, head_dim]
  constexpr int kRow = 4 + kHeadDim, kUnits = kHeadDim / kDims;
  const Scratch<Map> s = Scratch<Map>::here();
  const Workspace work(exchange.args);
  const int rows = plan.rows(u), team = u.kv_head * plan.row_tiles + u.row_tile;
  float* parts = work.partials() + (u64)team * plan.splits * kRows * kRow;
#pragma unroll 1
  for (int i = thread_index(); i < rows * kUnits; i += kConsumers) {
    const int row = i / kUnits, d = i % kUnits * kDims;
    const Part part = combined<Map>(Map::kSlots, [&](int slot) {
      const int at = slot * s.kSlotRows + row;
      return Part::of(s.sums[at * 2], s.sums[at * 2 + 1], *reinterpret_cast<const uint4*>(s.outputs + at * s.kStride + d));
    });
    if (plan.splits == 1) {
      finish(row, d, part);
      continue;
    }
    float* mine = parts + (u.split * kRows + row) * kRow;
#pragma unroll
    for (int j = 0; j < kDims; j++) mine[4 + d + j] = part.value[j];
    if (d == 0) mine[0] = part.maximum, mine[1] = part.sum;
  }
  if (plan.splits == 1) return;
  sync_consumers();  // the block's part is complete
  u32* last = reinterpret_cast<u32*>(s.queries);
  if (thread_index() == 0)  // publishes the part, sees the others', and counts from 0 again after the last
    *last = atom_inc_acq_rel_gpu(work.arrivals() + team, plan.splits - 1) == (u32)plan.splits - 1;
  sync_consumers();  // publishes who combines
  if (!*last) return;
#pragma unroll 1
  for (int i = thread_index(); i < rows * kUnits; i += kConsumers) {
    const int row = i / kUnits, d = i % kUnits * kDims;
    finish(row, d, combined<Map>(plan.splits, [&](int split) {
             const float* p = parts + (split * kRows + row) * kRow;
             return Part::of(ld_cg(p), ld_cg(p + 1), ld_cg(reinterpret_cast<const uint4*>(p + 4 + d)));
           }));
  }
}

// Attention's phase; out has the type that wo multiplies with.
template <class Map, bool kOutBf16>
__device__ void run(Consumer<Map>& consumer, Exchange<Map>& exchange, Deal& deal, const Plan<Map>& plan, int window,
                    const Qkv<Map>& qkv, const float* q_norm, const float* k_norm, u8* cache, const Attended<Map>& out) {
  const Deal::Share share = deal.take(plan.units());
  consumer.profile.mark(kBegin);
#pragma unroll 1
  for (int i = 0; i < share.count; i++) {
    const Unit u = unit_of(plan, share.first + i * kGrid);
    prepare(exchange, plan, u, qkv, q_norm, k_norm, cache);
    sync_consumers();  // publishes queries and fresh positions to the block's consumers
    consumer.profile.mark(kLoaded);
    attend_all(consumer, plan, u, window);
    consumer.profile.mark(kStreamed);
    combine(exchange, plan, u, [&](int row, int d, const Part& part) {
      const int global = u.row_tile * kRows + row, column = global / kGroup, head = u.kv_head * kGroup + global % kGroup;
      u32 pairs[kDims / 2];
#pragma unroll
      for (int i = 0; i < kDims / 2; i++)
        pairs[i] = round_pair<kOutBf16>(__fdividef(part.value[2 * i], part.sum), __fdividef(part.value[2 * i + 1], part.sum));
      out.put(exchange, column, head * kHeadDim + d, pairs);
    });
    sync_consumers();  // shared memory of the unit is free
  }
  consumer.profile.mark(kWritten);
}
}  // namespace attention
