// Finding the few values that decide among all of a vocabulary, by all blocks at once: values are counted
// in bins by their distance from the largest one. Bins tell how far the answer reaches; only the bins at
// its edge are listed, one by one, and settled by the block that arrives last. All sums are of integers,
// so that no result depends on an order.
#pragma once
#include "norm.cuh"

namespace ranking {

constexpr int kBins = 1024;

struct Bins {
  u64 weight[kBins];  // of scores, as top_p weighs them
  u32 count[kBins];   // of scores
  u32 logits[kBins];  // of logits as the model gave them
  u64 total;          // the softmax's denominator of those, in 2^-44
};

struct Entry {
  u32 key, token;
};

// What blocks share while they rank: zero between two steps.
struct Tail {
  u32 top_score, top_logit;  // as keys
  u32 listed, ranked;        // entries of the two lists
  Bins bins;
};
static_assert(sizeof(Tail) == kTailBytes, "Tail differs from TAIL_BYTES of codegen.py");

// Floats as integers that compare alike.
__device__ __forceinline__ u32 ordered(float v) {
  const u32 bits = __float_as_uint(v + 0.0f);  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// The bin of a value: 64 an octave of its distance from the top, from 2^-4 to 2^12. Never falls as the
// distance grows.
__device__ __forceinline__ int bin_of(float top, float v) {
  const int bin = int(__float_as_uint(top - v) >> 17) - (123 << 6);
  return bin < 0 ? 0 : smaller(bin, kBins - 1);
}

__device__ __forceinline__ u64 warp_total(u64 v) {
#pragma unroll
  for (int i = 16; i; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}

// The sum over the block's threads before this one; `all` becomes the sum over all of them.
template <class Map>
__device__ __forceinline__ u64 sum_before(u64 mine, u64& all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u64 sum = mine;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const u64 other = __shfl_up_sync(0xffffffffu, sum, i);
    if (lane >= i) sum += other;
  }
  u64* warps = reinterpret_cast<u64*>(Shared<Map>::scratch() + Map::kReduce);  // [kWarps]
  sync_consumers();  // nobody reads earlier sums any more
  if (lane == 31) warps[warp] = sum;
  sync_consumers();  // publishes the warps' sums
  u64 before = 0;
  all = 0;
  for (int w = 0; w < kWarps; w++) {
    if (w < warp) before += warps[w];
    all += warps[w];
  }
  return before + sum - mine;
}

// The largest key for which the weights of the entries with that key or a larger one reach the goal. In
// each round every warp tries another key: with 8 warps 11 rounds. Called by the block that arrived last;
// its acquire lets it read what others listed through L1, from the second round on.
template <class Map, class Weight>
__device__ u32 select(const Entry* list, u32 count, u64 goal, Weight weight) {
  u64* sums = reinterpret_cast<u64*>(Shared<Map>::scratch() + Map::kReduce);  // [kWarps]
  u64 low = 0, high = 1ull << 32;  // low reaches the goal, high does not
#pragma unroll 1
  while (high - low > 1) {
    const u64 step = (high - low + kWarps) / (kWarps + 1), key = low + (threadIdx.x / 32 + 1) * step;
    u64 sum = 0;
#pragma unroll 4
    for (u32 i = threadIdx.x % 32; i < count; i += 32)
      if (list[i].key >= key) sum += weight(list[i].key);
    sum = warp_total(sum);
    sync_consumers();  // the sums of the round before have been read
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = key < high ? sum : 0;
    sync_consumers();  // publishes what each key reaches
    int reached = 0;
    while (reached < kWarps && sums[reached] >= goal) reached++;
    low += reached * step;
    if (low + step < high) high = low + step;
  }
  return (u32)low;
}

// Which bins the filters keep whole, which they cut through, and which hold the likeliest tokens.
struct Bounds {
  int first;     // scores of bins before it are kept
  int last;      // scores of bins from first to last are listed, the others dropped
  int ranked;    // logits of bins up to it are listed
  u32 rank;      // of the last listed score that top_k keeps, from 1 on; 0: top_k drops none
  u64 weight;    // of the scores before first, for top_p
  u64 total;     // of all scores
};

// top_p's share of a mass, rounded up.
__device__ __forceinline__ u64 share_of(double top_p, u64 mass) {
  const double goal = top_p * (double)mass;
  return (u64)goal + ((double)(u64)goal < goal);
}

// Reads the grid's bins. top_k and n: 0 when nothing is asked of them; top_p: 1.
template <class Map>
__device__ Bounds find_bounds(const Bins& bins, u32 top_k, double top_p, u32 n) {
  constexpr int kEach = ceil_div(kBins, kConsumers);
  struct Found {
    Bounds bounds;
    u64 kept;  // weight of the scores before top_k's bin
  };
  Found* found = reinterpret_cast<Found*>(Shared<Map>::scratch());
  u64 weight[kEach], weights = 0, counts = 0;
  u32 count[kEach], logits[kEach];
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const int bin = threadIdx.x * kEach + i;
    weight[i] = 0, count[i] = logits[i] = 0;
    if (bin < kBins) weight[i] = ld_cg(bins.weight + bin), count[i] = ld_cg(bins.count + bin), logits[i] = ld_cg(bins.logits + bin);
    weights += weight[i];
    counts += (u64)count[i] << 32 | logits[i];
  }
  u64 all_weights, all_counts;
  const u64 weights_before = sum_before<Map>(weights, all_weights);
  const u64 counts_before = sum_before<Map>(counts, all_counts);
  if (threadIdx.x == 0) *found = {{top_p < 1 ? 0 : kBins, kBins, n ? kBins - 1 : -1, 0, 0, all_weights}, all_weights};
  sync_consumers();  // publishes what holds where no bin is found
  u64 before = weights_before;
  u32 scores = (u32)(counts_before >> 32), ranked = (u32)counts_before;
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const int bin = threadIdx.x * kEach + i;
    if (scores < top_k && scores + count[i] >= top_k) {
      found->bounds.last = bin, found->bounds.rank = top_k, found->kept = before;
      if (top_p >= 1) found->bounds.first = bin, found->bounds.rank -= scores;
    }
    if (ranked < n && ranked + logits[i] >= n) found->bounds.ranked = bin;
    before += weight[i], scores += count[i], ranked += logits[i];
  }
  sync_consumers();  // publishes top_k's bin to those who look for top_p's
  if (top_p < 1) {
    // How much of its last bin top_k keeps is not known yet. More of it can only raise the goal.
    const u64 goal = share_of(top_p, found->kept);
    before = weights_before, scores = (u32)(counts_before >> 32);
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      if (before < goal && before + weight[i] >= goal) {
        found->bounds.first = threadIdx.x * kEach + i, found->bounds.weight = before;
        if (found->bounds.rank) found->bounds.rank -= scores;
      }
      before += weight[i], scores += count[i];
    }
  }
  sync_consumers();  // publishes the bounds
  Bounds bounds = found->bounds;
  if (top_p < 1 && bounds.last == kBins) bounds.last = bounds.first;
  return bounds;
}

}  // namespace ranking
