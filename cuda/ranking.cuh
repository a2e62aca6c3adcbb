// Finding the few values that decide among all of a vocabulary, by all blocks at once: values are counted
// in bins by their distance from the largest one. Bins tell how far the answer reaches; only the bins at
// its edge are listed, one by one, and settled by the block that arrives last. All sums are of integers,
// so that no result depends on an order.
//
// All of this runs once a step, so that its instructions may have to come from L2: what is needed in several
// places is a function, not inlined.
#pragma once
#include "norm.cuh"

namespace ranking {

constexpr int kBins = 1024, kBinBits = 10;
constexpr int kEach = kBins / kConsumers;  // neighbouring bins of a thread
static_assert(kEach % 4 == 0 && kEach * kConsumers == kBins, "a thread reads its bins in whole vectors");

struct Bins {
  u64 weight[kBins];  // of scores, as top_p weighs them
  u32 count[kBins];   // of scores
  u32 logits[kBins];  // of logits as the model gave them
  u64 total;          // the softmax's denominator of those, in 2^-44
};

// Floats as integers that compare alike.
__device__ __forceinline__ u32 ordered(float v) {
  const u32 bits = __float_as_uint(v + 0.0f);  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// One of a list.
struct alignas(16) Entry {
  u32 key, token;
  float drawn;   // a score with its noise
  u32 weighted;  // as top_p weighs it, but 2^32 - 1 for 2^32, next to which there is none
  static __device__ __forceinline__ Entry of(float value, u32 token, float drawn, u64 weight) {
    return {ordered(value), token, drawn, (u32)(weight - (weight >> 32))};
  }
  __device__ __forceinline__ u64 weight() const { return weighted + (u64)(weighted == 0xffffffffu); }
};

// What blocks share while they rank. All of it is zero between two steps.
struct alignas(16) Tail {
  Bins bins;
  u64 entries;  // of the two lists: scores, and logits << 32
};
static_assert(sizeof(Tail) == kTailBytes, "Tail differs from TAIL_BYTES of workspace.py");

// Bins, as a power of two, of each octave of a value's distance from the top: from 2^-4 to 2^12. Most lie where top_p
// ends in flat distributions, so that few values share the bin at its edge.
__device__ constexpr int kOctaveBits[] = {4, 4, 5, 5, 6, 7, 8, 8, 6, 5, 5, 4, 4, 4, 4, 4};
struct Octave { int shift, less; };  // of a distance's bits, to its bin
__device__ constexpr int bins_before(int octave) { return octave == 0 ? 0 : bins_before(octave - 1) + (1 << kOctaveBits[octave - 1]); }
__device__ constexpr Octave octave(int i) { return {23 - kOctaveBits[i], ((123 + i) << kOctaveBits[i]) - bins_before(i)}; }
static_assert(bins_before(16) <= kBins, "each octave's bins follow those of the one before");
__constant__ Octave kOctaves[] = {octave(0), octave(1), octave(2),  octave(3),  octave(4),  octave(5),  octave(6),  octave(7),
                                  octave(8), octave(9), octave(10), octave(11), octave(12), octave(13), octave(14), octave(15)};

// The bin of a value. Never falls as the distance grows.
__device__ __forceinline__ int bin_of(float top, float v) {
  const u32 bits = __float_as_uint(top - v);
  const int octave = int(bits >> 23) - 123;
  return octave < 0 ? 0 : octave > 15 ? kBins - 1 : int(bits >> kOctaves[octave].shift) - kOctaves[octave].less;
}

// A place in shared memory for what one thread tells all.
template <class Map, class Told>
__device__ __forceinline__ Told& told() {
  static_assert(16 * kWarps + sizeof(Told) <= 256, "it lies behind what warps tell, in the room of _REDUCE_BYTES of tuning.py");
  return *reinterpret_cast<Told*>(Shared<Map>::scratch() + Map::kReduce + 16 * kWarps);
}

// The largest values of scores and of logits, as keys.
struct Tops {
  u32 score, logit;
};
// Over the block's consumers. `room`: 0 or 1, so that two calls one after the other need nothing between them.
template <class Map>
__device__ __noinline__ Tops largest(Tops mine, int room) {
  Tops* warps = reinterpret_cast<Tops*>(Shared<Map>::scratch() + Map::kReduce + room * 8 * kWarps);  // [kWarps]
  mine = {redux_sync_max(mine.score), redux_sync_max(mine.logit)};
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  sync_consumers();  // publishes the warps' largest, and the block's empty bins
#pragma unroll
  for (int w = 0; w < kWarps; w++) mine = {max(mine.score, warps[w].score), max(mine.logit, warps[w].logit)};
  return mine;
}

struct Sums {
  u64 before, all;  // over the block's threads before this one, and over all of them
};
template <class Map>
__device__ __noinline__ Sums sum_before(u64 mine) {
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
  Sums sums{sum - mine, 0};
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    if (w < warp) sums.before += warps[w];
    sums.all += warps[w];
  }
  return sums;
}

// Adds in shared memory, which adds 32 bits at a time; with 64 each would try until nobody comes between. Of
// all orders of additions each has the same carries.
__device__ __forceinline__ void add_wide(u64* sum, u64 v) {
  u32* words = reinterpret_cast<u32*>(sum);
  const u32 low = (u32)v, old = atomicAdd(words, low), high = (u32)(v >> 32) + (old + low < old);
  if (high) atomicAdd(words + 1, high);
}

// What a value counts for in a softmax where the largest counts for `unit`: top_p weighs scores in 2^-32.
__device__ __forceinline__ u64 weight_of(float v, float top, float unit = 4294967296.0f) { return (u64)(expf(v - top) * unit); }

// Calls use(place, entry) for this thread's part of a list; many reads are on their way at a time.
template <class Use>
__device__ __forceinline__ void each_entry(const Entry* list, u32 count, Use use) {
  constexpr u32 kBatch = 8;
#pragma unroll 1
  for (u32 first = threadIdx.x; first < count; first += kBatch * kConsumers) {
    Entry entries[kBatch];
#pragma unroll
    for (u32 i = 0; i < kBatch; i++) entries[i] = list[min(first + i * kConsumers, count - 1)];
    const u32 end = min(first + kBatch * kConsumers, count);
#pragma unroll 1
    for (u32 place = first; place < end; place += kConsumers) {
      use(place, entries[0]);
#pragma unroll
      for (u32 i = 1; i < kBatch; i++) entries[i - 1] = entries[i];
    }
  }
}

// A list, and between what keys its entries lie.
struct List {
  const Entry* entries;
  u32 count, low, high;
};

// Brings a list near: into the stages of the ring, where it fits. They are free, for the consumers have read
// all that the step streams. Called by the block that arrived last, whose acquire lets it read what others
// listed through L1.
template <class Map>
__device__ __noinline__ List bring(const Entry* from, u32 count) {
  Entry* room = reinterpret_cast<Entry*>(Shared<Map>::stage(0));
  const bool fits = count <= Map::kStages * kStageBytes / sizeof(Entry);
  u32 low = 0xffffffffu, high = 0;
  each_entry(from, count, [&](u32 place, Entry entry) {
    if (fits) room[place] = entry;
    low = min(low, entry.key), high = max(high, entry.key);
  });
#pragma unroll
  for (int i = 16; i; i /= 2) {
    low = min(low, __shfl_xor_sync(0xffffffffu, low, i));
    high = max(high, __shfl_xor_sync(0xffffffffu, high, i));
  }
  uint2* warps = reinterpret_cast<uint2*>(Shared<Map>::scratch() + Map::kReduce);  // [kWarps]
  sync_consumers();  // the room is free
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = make_uint2(low, high);
  sync_consumers();  // publishes the list and the warps' least and largest keys
#pragma unroll
  for (int w = 0; w < kWarps; w++) low = min(low, warps[w].x), high = max(high, warps[w].y);
  return {fits ? room : from, count, low, high};
}

// The order of the likeliest: among equal keys the lowest token first.
__device__ __forceinline__ u64 order_of(Entry entry) { return (u64)entry.key << 32 | ~entry.token; }

// What an entry counts for: one, or what top_p weighs it with if it is among those that top_k keeps.
struct Measure {
  bool counts;
  u32 least;  // key that top_k keeps
  __device__ __forceinline__ u64 operator()(Entry entry) const {
    return counts ? 1 : entry.key >= least ? entry.weight() : 0;
  }
};

// The largest key for which the weights of the entries with that key or a larger one reach the goal, which
// all entries together do. Each entry of a short list is compared with all of them.
constexpr int kShort = kConsumers / 2;
template <class Map>
__device__ __noinline__ u32 select_of_few(List list, u64 goal, Measure measure) {
  sync_consumers();  // nobody reads what was told before
  if (threadIdx.x < list.count) {
    const u32 key = list.entries[threadIdx.x].key;
    u64 before = 0, equal = 0;
    bool first = true;  // of the entries with its key
#pragma unroll 4
    for (u32 i = 0; i < list.count; i++) {
      const Entry other = list.entries[i];
      const u64 weight = measure(other);
      if (other.key > key) before += weight;
      if (other.key == key) equal += weight, first &= i >= threadIdx.x;
    }
    if (first && before < goal && before + equal >= goal) told<Map, u32>() = key;
  }
  sync_consumers();  // publishes the key
  return told<Map, u32>();
}

// The same of a list of any length. Of the range of keys, and then of the part of it in which the goal is reached,
// 1024 parts are weighed at a time, the one of the largest keys first. by_token: keys are order_of().
template <class Map>
__device__ __noinline__ u64 select(List list, bool by_token, u64 goal, Measure measure) {
  struct Found {
    u64 goal;  // what is left of it
    u32 part;
  };
  u64* parts = reinterpret_cast<u64*>(Shared<Map>::scratch());  // [kBins]
  u64* mine = parts + threadIdx.x * kEach;
#pragma unroll
  for (int i = 0; i < kEach; i++) mine[i] = 0;
  sync_consumers();  // the parts are empty
  const u64 low = by_token ? (u64)list.low << 32 : list.low;
  u64 high = by_token ? (u64)list.high << 32 | 0xffffffffu : list.high;
  int bits = 64 - __clzll(high - low);  // the range's: from high down
#pragma unroll 1
  while (bits > 0) {
    const int shift = bits > kBinBits ? bits - kBinBits : 0;
    each_entry(list.entries, list.count, [&](u32, Entry entry) {
      const u64 key = by_token ? order_of(entry) : entry.key, below = high - key;
      if (key <= high && below >> shift < kBins) add_wide(parts + (below >> shift), measure(entry));
    });
    sync_consumers();  // publishes the parts
    u64 weights[kEach], sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) weights[i] = mine[i], mine[i] = 0, sum += weights[i];
    u64 before = sum_before<Map>(sum).before;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      if (before < goal && before + weights[i] >= goal) told<Map, Found>() = {goal - before, threadIdx.x * kEach + i};
      before += weights[i];
    }
    sync_consumers();  // publishes the part in which the goal is reached
    goal = told<Map, Found>().goal;
    high -= (u64)told<Map, Found>().part << shift;
    bits = shift;
  }
  return high;
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

// Four words of a thread's bins at a time.
__device__ __forceinline__ void read_bins(const u32* from, u32 (&bins)[kEach]) {
#pragma unroll
  for (int i = 0; i < kEach; i += 4) {
    const uint4 v = ld_cg(reinterpret_cast<const uint4*>(from + threadIdx.x * kEach + i));
    bins[i] = v.x, bins[i + 1] = v.y, bins[i + 2] = v.z, bins[i + 3] = v.w;
  }
}
__device__ __forceinline__ void read_bins(const u64* from, u64 (&bins)[kEach]) {
#pragma unroll
  for (int i = 0; i < kEach; i += 2) {
    const uint4 v = ld_cg(reinterpret_cast<const uint4*>(from + threadIdx.x * kEach + i));
    bins[i] = (u64)v.y << 32 | v.x, bins[i + 1] = (u64)v.w << 32 | v.z;
  }
}

// Reads of the grid's bins what is asked for. top_k and n: 0 when nothing is asked of them; top_p: 1.
template <class Map>
__device__ Bounds find_bounds(const Bins& bins, u32 top_k, double top_p, u32 n) {
  struct Found {
    Bounds bounds;
    u64 kept;  // weight of the scores before top_k's bin
  };
  Found* found = reinterpret_cast<Found*>(Shared<Map>::scratch());
  u64 weight[kEach] = {}, weights = 0, counts = 0;
  u32 count[kEach] = {}, logits[kEach] = {};
  if (top_p < 1) read_bins(bins.weight, weight);
  if (top_k) read_bins(bins.count, count);
  if (n) read_bins(bins.logits, logits);
#pragma unroll
  for (int i = 0; i < kEach; i++) weights += weight[i], counts += (u64)count[i] << 32 | logits[i];
  const Sums of_weights = top_p < 1 ? sum_before<Map>(weights) : Sums(), of_counts = top_k || n ? sum_before<Map>(counts) : Sums();
  if (threadIdx.x == 0) *found = {{top_p < 1 ? 0 : kBins, kBins, n ? kBins - 1 : -1, 0, 0, of_weights.all}, of_weights.all};
  sync_consumers();  // publishes what holds where no bin is found
  u64 before = of_weights.before;
  u32 scores = (u32)(of_counts.before >> 32), ranked = (u32)of_counts.before;
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
    before = of_weights.before, scores = (u32)(of_counts.before >> 32);
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
