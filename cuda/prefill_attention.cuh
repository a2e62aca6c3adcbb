// Attention of a prompt: the cache holds the chunk's own keys and values already. A unit is a KV head and
// eight query rows for each of some warps; its block walks once through the past that any of them sees.
#pragma once
#include "attend.cuh"
#include "gemm.cuh"

namespace prompt {
using attention::kGroup;
using attention::kHeadDim;

// Warps of a block that have query rows: those of few tokens are spread over more blocks.
template <bool kFew>
constexpr int kRowWarps = kFew ? 2 : kWarps;
constexpr int kQueryBytes = kWarps * attention::kRows * attention::kQueryStride;
__device__ __forceinline__ u8* queries_of(int row) { return dynamic_smem() + row * attention::kQueryStride; }  // of a unit
constexpr int kRoom = (gemm::kStageRoom - kQueryBytes) / attention::kBlockBytes;
constexpr int kBlocks = kRoom >= 3 * 16 ? 16 : kRoom >= 3 * 8 ? 8 : 4;  // of positions: of a stage, and what a warp attends to at once
constexpr int kStages = smaller(4, kRoom / kBlocks);
static_assert(kStages >= 2, "queries and two stages must fit into shared memory");

__device__ __forceinline__ void norm_and_turn(attention::Head& head, const float* norm_weight, const StepArgs& args, int position) {
  head.norm_and_turn(norm_weight, [&](int d) { return rotation(args.rope_turns[d], position, args.rope_scale); });
}

// Keys, normed and rotated, and values of the chunk into the cache: a warp for each position of a KV head.
__device__ __noinline__ void fill_cache(const StepArgs& args, const float* qkv, const float* k_norm, u8* cache) {
  constexpr int kRowWidth = (model::kHeads + 2 * model::kKvHeads) * kHeadDim;
#pragma unroll 1
  for (int i = threadIdx.x / 32 * kGrid + blockIdx.x; i < args.n_columns * model::kKvHeads; i += kGrid * kWarps) {
    const int column = i / model::kKvHeads, kv_head = i % model::kKvHeads, position = args.position + column;
    u8* block = cache + attention::block_offset(kv_head, position / 16, args.max_blocks);
    const float* row = qkv + (u64)column * kRowWidth + (model::kHeads + kv_head) * kHeadDim;
    attention::Head key, value;  // both on their way before the first is needed
    key.read(row), value.read(row + model::kKvHeads * kHeadDim);
    norm_and_turn(key, k_norm, args, position);
    key.each([&](int d, float v) { *reinterpret_cast<u16*>(block + attention::k_offset(position % 16, d)) = attention::rounded(v); });
    value.each([&](int d, float v) { *reinterpret_cast<u16*>(block + attention::v_offset(position % 16, d)) = attention::rounded(v); });
  }
}

// The query rows of a unit, normed and rotated, into shared memory: `rows` from `first` on, of a KV head. Those that are not
// there are columns that nobody reads. The barriers of the pipeline after it publish the rows, and free their room.
template <int kUnitRows>
__device__ void load_queries(const StepArgs& args, const float* qkv, const float* q_norm, int kv_head, int first, int rows) {
  constexpr int kRowWidth = (model::kHeads + 2 * model::kKvHeads) * kHeadDim;
  const auto column_of = [&](int r) { return (first + r) / kGroup; };
  attention::each_row<smaller(4, ceil_div(kUnitRows, kWarps))>(
      rows,
      [&](int r, attention::Head& head) { head.read(qkv + (u64)column_of(r) * kRowWidth + (kv_head * kGroup + (first + r) % kGroup) * kHeadDim); },
      [&](int r, attention::Head& head) {
        norm_and_turn(head, q_norm, args, args.position + column_of(r));
        head.each([&](int d, float v) { reinterpret_cast<u16*>(queries_of(r))[d] = attention::rounded(v); });
      });
}

// All units, those with the longest past first. out: what m multiplies with.
template <bool kFew, Matrix m>
__device__ __noinline__ void attend_prompt(const StepArgs& args, int window, const float* qkv, const float* q_norm, const u8* cache, gemm::Operand<m> out) {
  constexpr int kUnitRows = kRowWarps<kFew> * attention::kRows;
  const int all_rows = kGroup * args.n_columns, row_tiles = ceil_div(all_rows, kUnitRows);
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll 1
  for (int unit = blockIdx.x; unit < row_tiles * model::kKvHeads; unit += kGrid) {
    const int kv_head = unit % model::kKvHeads, unit_row = (row_tiles - 1 - unit / model::kKvHeads) * kUnitRows;
    const int warp = threadIdx.x / 32, first = unit_row + warp * attention::kRows;
    const int rows = warp < kRowWarps<kFew> ? smaller(attention::kRows, all_rows - first) : 0;
    const auto position_of = [&](int row) { return args.position + row / kGroup; };
    // Stages begin at multiples of kBlocks wherever a unit does, so that a row's sums have the same order in all units.
    const int oldest = window ? position_of(unit_row) - window + 1 : 0, begin = oldest > 0 ? oldest / 16 / kBlocks * kBlocks : 0;
    const int end = position_of(smaller(unit_row + kUnitRows, all_rows) - 1) / 16 + 1;
    const int last = position_of(first + rows - 1);
    load_queries<kUnitRows>(args, qkv, q_norm, kv_head, unit_row, smaller(kUnitRows, all_rows - unit_row));
    const auto seen = attention::Seen::of([&](int row) { return position_of(first + row); }, last, window);
    attention::Running run;
    gemm::pipeline<kStages, kBlocks * attention::kBlockBytes>(
        dynamic_smem() + kQueryBytes, ceil_div(end - begin, kBlocks),
        [&](u8* stage, int i, u64* landed) {
          const int block = begin + i * kBlocks, bytes = smaller(kBlocks, end - block) * attention::kBlockBytes;
          gemm::begin_copies(landed, gemm::Runs<1, kBlocks * attention::kBlockBytes>{
                                         stage, cache + attention::block_offset(kv_head, block, args.max_blocks), 0, 1, bytes});
        },
        [&](const u8* stage, int i) {
          const int from = (begin + i * kBlocks) * 16;
          if (rows <= 0 || from > last) return;
          attention::attend<kBlocks>(run, stage, smaller(kBlocks, (last - from) / 16 + 1), queries_of(warp * attention::kRows), from, seen);
        });
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float sum = run.sum[i];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      const int row = first + 2 * q + i, head = kv_head * kGroup + row % kGroup;
      if (2 * q + i >= rows) continue;
      u8* to = reinterpret_cast<u8*>(out.element(row / kGroup, head * kHeadDim + g));
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; d++)
        *reinterpret_cast<u16*>(to + out.rows_further(d)) = (u16)round_pair<m.bf16()>(__fdividef(run.out[d / 2][d % 2 * 2 + i], sum), 0.0f);
    }
  }
}
}  // namespace prompt
