// Attention of a prompt: the cache holds the chunk's own keys and values already. A unit is a KV head and
// eight query rows for each of some warps; its block walks once through the past that any of them sees, or
// several blocks through parts of it.
#pragma once
#include "attend.cuh"
#include "gemm.cuh"

namespace prompt {
using attention::kGroup;
using attention::kHeadDim;

constexpr int kQueryBytes = kWarps * attention::kRows * attention::kQueryStride;
__device__ __forceinline__ u8* queries_of(int row) { return dynamic_smem() + row * attention::kQueryStride; }  // of a unit
constexpr int kRoom = (gemm::kStageRoom - kQueryBytes) / attention::kBlockBytes, kSpanBlocks = kSpan / 16;  // of 16 positions
constexpr int kBlocks = smaller(kSpanBlocks, kRoom >= 3 * 16 ? 16 : kRoom >= 3 * 8 ? 8 : 4);  // of a stage, and what a warp attends to at once
static_assert(kSpanBlocks % kBlocks == 0, "a span must be whole stages");
constexpr int kStages = smaller(4, kRoom / kBlocks);
static_assert(kStages >= 2, "queries and two stages must fit into shared memory");

// Of a chunk, as the product left it: [column][heads of q, then of k, then of v][kHeadDim].
constexpr int kRowHeads = model::kHeads + 2 * model::kKvHeads;

// Normed and rotated: the chunk's keys, into the cache like its values, and its queries, which stay in their place, rounded and
// so in the first half of it. A warp has a head of a column, or several where there are many columns: they turn alike.
template <bool kFew>
__device__ __noinline__ void turn_heads(const StepArgs& args, float* qkv, const float* q_norm, const float* k_norm, u8* cache) {
  using attention::Head;
  const int warps = kGrid * kWarps / args.n_columns, parts = kFew || warps > kRowHeads ? kRowHeads : warps < 1 ? 1 : warps;
#pragma unroll 1
  for (int i = threadIdx.x / 32 * kGrid + blockIdx.x; i < args.n_columns * parts; i += kGrid * kWarps) {
    const int column = i / parts, position = args.position + column;
    const auto row = [&](int head) { return qkv + ((u64)column * kRowHeads + head) * kHeadDim; };
    Rotation turns[Head::kPairs];
    attention::each_row<4>(
        i % parts, parts, kRowHeads, [&](int head, Head& h) { h.read(row(head)); },
        [&](int head, Head& h) {
          if (head == i % parts)  // while the first heads are on their way
#pragma unroll
            for (int j = 0; j < Head::kPairs; j++)
              if (Head::dim(j) >= 0) turns[j] = rotation(args.rope_turns[Head::dim(j)], position, args.rope_scale);
          const bool query = head < model::kHeads, value = head >= model::kHeads + model::kKvHeads;
          if (!value) h.norm_and_turn(query ? q_norm : k_norm, [&](int j) { return turns[j]; });
          __syncwarp();  // all lanes have read the row
          const int kv_head = query ? 0 : (head - model::kHeads) % model::kKvHeads;
          u8* block = cache + attention::block_offset(kv_head, position / 16, args.max_blocks);
          h.each([&](int d, float v) {
            u8* to = query ? reinterpret_cast<u8*>(row(head)) + d * 2 : block + (value ? attention::v_offset(position % 16, d) : attention::k_offset(position % 16, d));
            *reinterpret_cast<u16*>(to) = attention::rounded(v);
          });
        });
  }
}

// The query rows of a unit into shared memory: `rows` from `first` on, of a KV head. Those that are not there are columns
// that nobody reads. The barriers of the pipeline that it is part of publish the rows, and free their room.
__device__ __forceinline__ void load_queries(const float* qkv, int kv_head, int first, int rows) {
  constexpr int kUnits = kHeadDim / 8;  // of 16 bytes
#pragma unroll 2
  for (int i = threadIdx.x; i < rows * kUnits; i += kConsumers) {
    const int r = i / kUnits, at = (first + r) / kGroup * kRowHeads + kv_head * kGroup + (first + r) % kGroup;
    reinterpret_cast<uint4*>(queries_of(r))[i % kUnits] = ld_cg(reinterpret_cast<const uint4*>(qkv + (u64)at * kHeadDim) + i % kUnits);
  }
}

// Rows that a warp attends to, in all of the past or in some of it.
struct Rows {
  int kv_head, first, count;  // of the KV head's; 0: none
  // Writes dims 16 * slice and on, of which there are kSlices * 16.
  template <Matrix m, int kSlices>
  __device__ __forceinline__ void write(const gemm::Operand<m>& out, const attention::Known<kSlices>& known, int slice) const {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = first + 2 * q + i, head = kv_head * kGroup + row % kGroup;
      if (2 * q + i >= count) continue;
      u8* to = reinterpret_cast<u8*>(out.element(row / kGroup, head * kHeadDim + g));
#pragma unroll
      for (int d = 0; d < kSlices * 2; d++)
        *reinterpret_cast<u16*>(to + out.rows_further(slice * 2 + d)) =
            (u16)round_pair<m.bf16()>(__fdividef(known.out[d / 2][d % 2 * 2 + i], known.sum[i]), 0.0f);
    }
  }
};

// Who attends to what. Time is counted in spans: an item, whatever it is, costs one more to begin with, and two more put the spans
// of a unit together.
struct Plan {
  int row_warps, row_tiles, units, spans;  // warps of a block that have rows; items of a unit
  template <bool kFew>
  static __device__ __forceinline__ Plan of(int rows, int spans) {
    const auto plan = [&](int row_warps, int spans) {
      const int tiles = ceil_div(rows, row_warps * attention::kRows);
      return Plan{row_warps, tiles, tiles * model::kKvHeads, spans};
    };
    if (!kFew) return plan(kWarps, 1);
    const Plan whole = plan(2, 1), dealt = plan(kDealtRowWarps, spans);  // few rows, on as many blocks as they can be
    const int rounds = ceil_div(dealt.items(), kGrid);
    return dealt.items() <= kMostParts && 2 * rounds + 2 < ceil_div(whole.units, kGrid) * spans ? dealt : whole;
  }
  __device__ __forceinline__ int items() const { return units * spans; }
};

// What a warp knows of its rows in one span, on its way to the block that puts spans together: maxima and sums of the lanes
// 0 to 3, then [head_dim / 16][lane] of Known::out.
struct Part {
  static constexpr int kSlices = kHeadDim / 16;
  uint4 *sums, *out;
  __device__ __forceinline__ Part(uint4* parts, int index) : sums(parts + (u64)index * (4 + kSlices * 32)), out(sums + 4) {}

  __device__ __forceinline__ void put(const attention::Running& run) const {
    const int lane = threadIdx.x % 32;
    const auto bits = [](float a, float b, float c, float d) { return make_uint4(__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d)); };
    if (lane < 4) sums[lane] = bits(run.maximum[0], run.maximum[1], run.sum[0], run.sum[1]);
#pragma unroll
    for (int d = 0; d < kSlices; d++) out[d * 32 + lane] = bits(run.out[d][0], run.out[d][1], run.out[d][2], run.out[d][3]);
  }
  // Slices `first` and on.
  template <int kCount>
  __device__ __forceinline__ void get(attention::Known<kCount>& to, int first) const {
    const int lane = threadIdx.x % 32;
    const uint4 s = ld_cg(sums + lane % 4);
    to.maximum[0] = __uint_as_float(s.x), to.maximum[1] = __uint_as_float(s.y), to.sum[0] = __uint_as_float(s.z), to.sum[1] = __uint_as_float(s.w);
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const uint4 v = ld_cg(out + (first + i) * 32 + lane);
      to.out[i][0] = __uint_as_float(v.x), to.out[i][1] = __uint_as_float(v.y), to.out[i][2] = __uint_as_float(v.z), to.out[i][3] = __uint_as_float(v.w);
    }
  }
};

// Puts the spans of a unit together, by the block that arrives last. rows_of(warp): what each warp attended to.
template <Matrix m, class RowsOf>
__device__ __forceinline__ void combine(const StepArgs& args, int unit, int span, int spans, RowsOf rows_of, const attention::Running& run,
                                        const gemm::Operand<m>& out) {
  const Workspace work(args);
  const int warp = threadIdx.x / 32;
  const auto part = [&](int s, int w) { return Part(work.prefill_parts(), (unit * spans + s) * kDealtRowWarps + w); };
  if (rows_of(warp).count > 0) part(span, warp).put(run);
  sync_consumers();  // the block's part is complete
  if (threadIdx.x == 0)  // publishes the part, sees the others', and counts from 0 again after the last
    gemm::spare_word() = atom_inc_acq_rel_gpu(work.prefill_arrivals() + unit, spans - 1) == (u32)spans - 1;
  sync_consumers();  // publishes who combines
  if (!gemm::spare_word()) return;
  constexpr int kMine = ceil_div(kDealtRowWarps * Part::kSlices, kWarps), kAtOnce = 16 / kMine;  // slices; spans on their way
  static_assert(Part::kSlices % kMine == 0, "a warp must have slices of the same rows");
#pragma unroll 1
  for (int i = warp * kMine; i < kDealtRowWarps * Part::kSlices; i += kWarps * kMine) {
    const int w = i / Part::kSlices, slice = i % Part::kSlices;
    const Rows rows = rows_of(w);
    if (rows.count <= 0) continue;
    attention::Known<kMine> all;
#pragma unroll 1
    for (int s = 0; s < spans; s += kAtOnce) {
      attention::Known<kMine> some[kAtOnce];  // nothing where there is no span: adding that changes nothing, and takes no branch
#pragma unroll
      for (int j = 0; j < kAtOnce; j++)
        if (s + j < spans) part(s + j, w).get(some[j], slice);
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) all.add(some[j]);
    }
    rows.write(out, all, slice);
  }
}

// All units, those with the longest past first. out: what m multiplies with.
//
// Positions are attended to in spans of kSpan, counted from position 0, whose results are put together in order: so a row's
// result has the same bits however its spans are dealt.
template <bool kFew, Matrix m>
__device__ __noinline__ void attend_prompt(const StepArgs& args, int window, const float* qkv, const u8* cache, gemm::Operand<m> out) {
  const int all_rows = kGroup * args.n_columns;
  const auto position_of = [&](int row) { return args.position + row / kGroup; };
  // The first block of positions that is seen from a position on, at the beginning of a stage: so that a row's sums have the same
  // order in all units.
  const auto oldest_block = [&](int position) { return window && position >= window ? (position - window + 1) / 16 / kBlocks * kBlocks : 0; };
  const int first_span = oldest_block(args.position) / kSpanBlocks, spans = position_of(all_rows - 1) / kSpan - first_span + 1;
  const Plan plan = Plan::of<kFew>(all_rows, spans);
  const bool dealt = kFew && plan.spans > 1;  // each span is an item of its own
#pragma unroll 1
  for (int item = blockIdx.x; item < plan.items(); item += kGrid) {
    const int unit = item % plan.units, warp = threadIdx.x / 32, unit_rows = plan.row_warps * attention::kRows;
    const int kv_head = unit % model::kKvHeads, unit_row = (plan.row_tiles - 1 - unit / model::kKvHeads) * unit_rows;
    const int last_row = smaller(unit_row + unit_rows, all_rows) - 1;
    const auto rows_of = [&](int warp) {
      const int first = unit_row + warp * attention::kRows;
      return Rows{kv_head, first, warp < plan.row_warps ? smaller(attention::kRows, all_rows - first) : 0};
    };
    const Rows rows = rows_of(warp);
    int begin = oldest_block(position_of(unit_row)), end = position_of(last_row) / 16 + 1;
    if (dealt) {
      const int span_begin = (first_span + item / plan.units) * kSpanBlocks;
      begin = begin < span_begin ? span_begin : begin, end = smaller(end, span_begin + kSpanBlocks);
    }
    const int last = position_of(rows.first + rows.count - 1), stages = begin < end ? ceil_div(end - begin, kBlocks) : 0;
    const auto seen = attention::Seen::of([&](int row) { return position_of(rows.first + row); }, last, window);
    attention::Running run, all;
    gemm::pipeline<kStages, kBlocks * attention::kBlockBytes>(
        dynamic_smem() + kQueryBytes, stages,
        [&](u8* stage, int i, u64* landed) {
          const int block = begin + i * kBlocks, bytes = smaller(kBlocks, end - block) * attention::kBlockBytes;
          gemm::begin_copies(landed, gemm::Runs<1, kBlocks * attention::kBlockBytes>{
                                         stage, cache + attention::block_offset(kv_head, block, args.max_blocks), 0, 1, bytes});
        },
        [&](const u8* stage, int i) {
          const int block = begin + i * kBlocks, from = block * 16;
          if (rows.count <= 0) return;
          if (from <= last)
            attention::attend<kBlocks>(run, stage, smaller(kBlocks, (last - from) / 16 + 1), queries_of(warp * attention::kRows), from, seen);
          if ((block + kBlocks) % kSpanBlocks != 0 && i + 1 < stages) return;  // the span goes on
          run.sum[0] = attention::sum_of_row(run.sum[0]), run.sum[1] = attention::sum_of_row(run.sum[1]);
          all.add(run);
          run = {};
        },
        [&] { load_queries(qkv, kv_head, unit_row, last_row + 1 - unit_row); });
    if constexpr (kFew) {
      if (dealt) {
        combine(args, unit, item / plan.units, spans, rows_of, all, out);
        continue;
      }
    }
    rows.write(out, all, 0);
  }
}
}  // namespace prompt
