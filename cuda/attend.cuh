// Attention of eight query rows to blocks of 16 positions, by one warp: what steps and prompts have in common.
//
// The cache of one layer is [kv head][block of 16 positions][K | V]:
//   K [head_dim / 32][2 h][8 g][4 q][2 j][2 i][2 p]: dim 32 d + 8 q + 4 h + 2 j + p at position 8 i + g,
//   V [head_dim / 16][8 g][4 q][2 h][2 i][2 p]: dim 16 d + 8 i + g at position 8 h + 2 q + p,
// so that a lane's fragment is 16 consecutive bytes. Scores are K times queries, outputs V times weights:
// the queries are always the 8 columns of an mma, and a transposed register carries weights over.
#pragma once
#include "heads.cuh"

namespace attention {
constexpr int kGroup = model::kHeads / model::kKvHeads;  // query heads of a KV head
constexpr int kHalfBytes = 16 * kHeadDim * 2;            // K or V of one block of positions
constexpr int kBlockBytes = 2 * kHalfBytes;

__device__ __forceinline__ u64 block_offset(int kv_head, int block, int max_blocks) { return ((u64)kv_head * max_blocks + block) * kBlockBytes; }
__device__ __forceinline__ int k_offset(int position, int dim) {
  return dim / 32 * 1024 + dim % 8 / 4 * 512 + position % 8 * 64 + dim % 32 / 8 * 16 + dim % 4 / 2 * 8 + position / 8 * 4 + dim % 2 * 2;
}
__device__ __forceinline__ int v_offset(int position, int dim) {
  return kHalfBytes + dim / 16 * 512 + dim % 8 * 64 + position % 8 / 2 * 16 + position / 8 * 8 + dim % 16 / 8 * 4 + position % 2 * 2;
}

// Query rows that a warp handles: the columns of an mma. In shared memory they are padded by 16 bytes against bank conflicts.
constexpr int kRows = 8;
constexpr int kQueryStride = kHeadDim * 2 + 16;

// A lane's sum to that of all lanes with the same query rows.
__device__ __forceinline__ float sum_of_row(float sum) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  return sum;
}

// What one warp knows of its query rows 2 q and 2 q + 1: running maximum, this lane's sum (or the row's), and the
// weighted values of dims 16 d + g (out[d][0..1]) and 16 d + g + 8 (out[d][2..3]), from some d on.
template <int kSlices>
struct Known {
  float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {}, out[kSlices][4] = {};

  // Adds what is known of later positions; both with the sums of rows. Written so that no compiler has a choice of how to round.
  __device__ __forceinline__ void add(const Known& later) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float top = fmaxf(maximum[i], later.maximum[i]), base = top == -kInfinity ? 0.0f : top;
      const float before = ex2_approx(maximum[i] - base), after = ex2_approx(later.maximum[i] - base);
      maximum[i] = top;
      sum[i] = fmaf(later.sum[i], after, sum[i] * before);
#pragma unroll
      for (int j = i; j < kSlices * 4; j += 2) out[j / 4][j % 4] = fmaf(later.out[j / 4][j % 4], after, out[j / 4][j % 4] * before);
    }
  }
};
using Running = Known<kHeadDim / 16>;

// The positions that this lane's query rows 2 q and 2 q + 1 see: after `before`, up to `last`. Both are counted from
// the same position as what they are compared with.
struct Seen {
  int before[2], last[2];
  // position_of(row): the row's own.
  template <class PositionOf>
  static __device__ __forceinline__ Seen of(PositionOf position_of, int last, int window) {
    Seen seen;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int own = position_of(thread_index() % 4 * 2 + i);
      seen.before[i] = window ? own - window : -1, seen.last[i] = smaller(own, last);
    }
    return seen;
  }
  __device__ __forceinline__ bool operator()(int i, int position) const { return (position > before[i]) & (position <= last[i]); }
  // Whether all rows of the warp see all positions from `first` to `to`. Rows are in the order of their positions.
  __device__ __forceinline__ bool all(int first, int to) const { return __all_sync(0xffffffffu, (first > before[1]) & (to <= last[0])); }
};

// kBlocks blocks of 16 positions from `first` on at once, of which `count` are there; no row sees the others, whose
// weights are zero. Only masks branch, so that the products' latencies overlap. queries: [kRows][kQueryStride].
template <int kBlocks>
__device__ __forceinline__ void attend(Running& run, const u8* blocks, int count, const u8* queries, int first, const Seen& seen) {
  const int lane = thread_index() % 32, g = lane / 4, q = lane % 4;
  constexpr int kSums = kBlocks == 1 ? 2 : 1;  // of a score: products of several blocks overlap anyway
  float sums[kBlocks][kSums][4] = {};
#pragma unroll
  for (int d = 0; d < kHeadDim / 32; d++) {
    const uint4 query = *reinterpret_cast<const uint4*>(queries + g * kQueryStride + d * 64 + q * 16);
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
      const uint4* keys = reinterpret_cast<const uint4*>(blocks + b * kBlockBytes + d * 1024);
      const uint4 v = keys[lane], u = keys[32 + lane];
      mma<kKvBf16>(sums[b][0], {v.x, v.y, v.z, v.w}, query.x, query.y);
      mma<kKvBf16>(sums[b][kSums - 1], {u.x, u.y, u.z, u.w}, query.z, query.w);
    }
  }
  float score[kBlocks][2][2];  // of row 2 q + i, position g and g + 8
#pragma unroll
  for (int j = 0; j < kBlocks * 4; j++) score[j / 4][j % 2][j / 2 % 2] = kSums == 1 ? sums[j / 4][0][j % 4] : sums[j / 4][0][j % 4] + sums[j / 4][1][j % 4];
  if (kBlocks == 1 || !seen.all(first, first + kBlocks * 16 - 1))
#pragma unroll
    for (int j = 0; j < kBlocks * 4; j++)
      if (!seen(j % 2, first + j / 4 * 16 + j / 2 % 2 * 8 + g)) score[j / 4][j % 2][j / 2 % 2] = -kInfinity;
  float rescale[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float top = -kInfinity;
#pragma unroll
    for (int b = 0; b < kBlocks; b++) top = fmaxf(top, fmaxf(score[b][i][0], score[b][i][1]));
#pragma unroll
    for (int other = 4; other < 32; other *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, other));
    const float maximum = fmaxf(run.maximum[i], top * model::kScoreScale), base = maximum == -kInfinity ? 0.0f : maximum;
    rescale[i] = ex2_approx(run.maximum[i] - base);
    run.maximum[i] = maximum;
    run.sum[i] *= rescale[i];
#pragma unroll
    for (int j = 0; j < kBlocks * 2; j++) {
      float& s = score[j / 2][i][j % 2];
      s = ex2_approx(fmaf(s, model::kScoreScale, -base));  // scores become weights
      run.sum[i] += s;
    }
  }
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; d++)
#pragma unroll
    for (int i = 0; i < 4; i++) run.out[d][i] *= rescale[i % 2];
#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
    const u8* values = blocks + (kBlocks == 1 ? 0 : smaller(b, count - 1)) * kBlockBytes + kHalfBytes;  // zero times any number there is
    const u32 b0 = movmatrix_trans(round_pair<kKvBf16>(score[b][0][0], score[b][1][0]));
    const u32 b1 = movmatrix_trans(round_pair<kKvBf16>(score[b][0][1], score[b][1][1]));
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; d++) {
      const uint4 v = *reinterpret_cast<const uint4*>(values + d * 512 + lane * 16);
      mma<kKvBf16>(run.out[d], {v.x, v.y, v.z, v.w}, b0, b1);
    }
  }
}
}  // namespace attention
