// The weight stream: one producer warp fills a ring of stages in shared memory for the whole step, and
// each consumer warp empties the stages that are its own.
//
// Copies land out of order and a parity bit only tells neighbours apart: a warp that waits for a stage
// must have seen that stage's previous copy itself. Map::kStages % kWarps == 0
// gives every warp fixed stages.
#pragma once
#include "profile.cuh"
#include "sync.cuh"

template <class Map>
struct Ring {
  static_assert(Map::kStages % kWarps == 0, "a warp must own fixed stages, see above");
  u64 full[Map::kStages];        // completes when a copy has landed
  u64 empty[Map::kStages];       // completes when all lanes of its warp have read it; lies behind full
  u64 columns;                   // completes when activations have landed (cuda/columns.cuh); not used with one column
  u32 progress;                  // copies so far, times 2; odd while the producer waits for a free stage
};

template <class Map>
struct Shared {
  static __device__ __forceinline__ Ring<Map>& ring(u8* smem = dynamic_smem()) { return *reinterpret_cast<Ring<Map>*>(smem); }
  static __device__ __forceinline__ u8* stage(int s, u8* smem = dynamic_smem()) { return smem + Map::kStageData + s * kStageBytes; }
  static __device__ __forceinline__ u8* scratch() { return dynamic_smem() + Map::kScratch; }
  // Behind the sums of warps, see _REDUCE_BYTES of tuning.py: 64 bytes of struct Norms, and who completes a team.
  static __device__ __forceinline__ u8* norms() { return scratch() + Map::kReduce + 128; }
  static __device__ __forceinline__ u8* team() { return scratch() + Map::kReduce + 192; }
};

// Copies that have not landed, at most: so many bytes of them, but two where chunks are large, and never all stages, for a
// stage cannot be filled twice.
template <class Map>
__device__ constexpr int copies_in_flight(u32 bytes, int chunk_bytes) {
  const int most = int(bytes) / chunk_bytes;
  return most < 2 ? 2 : smaller(most, Map::kStages - 1);
}

template <class Map>
__device__ __forceinline__ void init_ring(Ring<Map>& ring) {
#pragma unroll 1
  for (int s = 0; s < Map::kStages; s++) {
    mbarrier_init(&ring.full[s], kBulkCopy ? 1 : 32);
    mbarrier_init(&ring.empty[s], 32);
  }
  if constexpr (Map::kColumns > 1) mbarrier_init(&ring.columns, kWarps);
  ring.progress = 0;
  fence_mbarrier_init();
}

// `barrier` counts on from full[0]; an address would cost the fast path the registers of a generic pointer.
template <class Map>
__device__ __noinline__ void wait_long(int barrier, u32 parity, u32* alarm, u64 limit_ns) {
  Patience patience(limit_ns);
  while (!mbarrier_try_wait_parity(Shared<Map>::ring().full + barrier, parity))
    if (patience.over()) {
      raise_alarm(alarm, kAlarmRing, barrier, parity, !parity);
      return;
    }
}
template <class Map>
__device__ __forceinline__ void wait_parity(int barrier, u32 parity, const StepArgs& args, u8* smem = dynamic_smem()) {
#pragma unroll 1
  for (int i = 0; i < 64; i++)
    if (mbarrier_try_wait_parity(Shared<Map>::ring(smem).full + barrier, parity)) return;
  wait_long<Map>(barrier, parity, args.alarm, args.watchdog_ns);
}

// The producer's side. All lanes of the warp call copy(); with bulk copies lane 0 does the work.
// Issuing a copy is the pace of the whole ring, so this is short: no counters but the prefetcher's, and waits for what never
// was started pass, as a barrier that is new takes its round -1 for complete.
template <class Map>
struct Producer {
  const StepArgs& args;
  u8* const smem;  // kept_smem()
  int stage = 0;   // next stage to fill
  u32 parity = 0;  // of that stage's current round
  u32 issued = 0;  // copies so far

  __device__ __forceinline__ explicit Producer(const StepArgs& args) : args(args), smem(kept_smem()) {}

  // Waits until the copy in_flight before has landed, and for the stage to be free.
  __device__ __forceinline__ void copy(const u8* src, u32 bytes, int in_flight) {
    await_landing(in_flight);
    if constexpr (kPrefetch > 0) {
      Ring<Map>& ring = Shared<Map>::ring(smem);
      if (!mbarrier_try_wait_parity(&ring.empty[stage], parity ^ 1)) {
        atom_exch_cta(&ring.progress, issued * 2 + 1);
        wait_parity<Map>(Map::kStages + stage, parity ^ 1, args, smem);
      }
      atom_exch_cta(&ring.progress, ++issued * 2);
    } else {
      wait_parity<Map>(Map::kStages + stage, parity ^ 1, args, smem);
    }
    start(src, bytes);
    if (++stage == Map::kStages) stage = 0, parity ^= 1;
  }

  // A block must not exit while copies into its shared memory are on their way.
  __device__ __forceinline__ void drain() {
#pragma unroll 1
    for (int before = Map::kStages - 1; before > 0; before--) await_landing(before);
  }

 private:
  __device__ __forceinline__ void await_landing(int before) {
    const bool wrapped = stage < before;
    wait_parity<Map>(stage - before + (wrapped ? Map::kStages : 0), parity ^ wrapped, args, smem);
  }
  __device__ __forceinline__ void start(const u8* src, u32 bytes) {
    u64* full = Shared<Map>::ring(smem).full + stage;
    u8* dst = Shared<Map>::stage(stage, smem);
    if constexpr (kBulkCopy) {
      mbarrier_arrive_expect_tx(full, bytes);
      cp_async_bulk_once(dst, src, bytes, full);
    } else {
      for (u32 i = threadIdx.x % 32 * 16; i < bytes; i += 512) cp_async_16(dst + i, src + i);
      cp_async_mbarrier_arrive_noinc(full);
    }
  }
};

// Walks ahead of the producer, in a warp of its own. While the ring is full it brings the next chunks from device
// memory into L2, so that the memory is not idle while the consumers wait for other blocks; never else, for
// that would only lengthen the queue before it.
template <class Map>
struct Prefetcher {
  u32 chunk = 0;

  __device__ __forceinline__ void fetch(const u8* src, u32 bytes) {
    Ring<Map>& ring = Shared<Map>::ring();
#pragma unroll 1
    while (true) {
      const u32 progress = __shfl_sync(0xffffffffu, threadIdx.x % 32 ? 0 : atom_or_cta(&ring.progress, 0), 0);
      const int ahead = int(chunk - progress / 2);
      if (ahead < 0) break;
      if (ahead < kPrefetch && progress % 2) {
#pragma unroll 1
        for (u32 at = threadIdx.x % 32 * 128; at < bytes; at += 32 * 128) prefetch_l2(src + at);
        nanosleep(kPrefetchNs);
        break;
      }
      nanosleep(kPrefetchNs / 2);
    }
    chunk++;
  }
};

// Either of them, by warp: the walk over all that is streamed is compiled once. Their loops over the chunks of a piece are
// apart, for that is where the producer's pace is made.
template <class Map>
struct Streamer {
  const bool ahead;
  Producer<Map> producer;
  Prefetcher<Map> prefetcher;

  __device__ __forceinline__ explicit Streamer(const StepArgs& args) : ahead(kPrefetch > 0 && threadIdx.x >= kConsumers + 32), producer(args) {}
  __device__ __forceinline__ void copy(const u8* src, int bytes, int chunk_bytes, int in_flight) {
    if (ahead) {
#pragma unroll 1
      for (; bytes > 0; bytes -= chunk_bytes, src += chunk_bytes) prefetcher.fetch(src, smaller(bytes, chunk_bytes));
    } else {
#pragma unroll 1
      for (; bytes > 0; bytes -= chunk_bytes, src += chunk_bytes) producer.copy(src, smaller(bytes, chunk_bytes), in_flight);
    }
  }
  __device__ __forceinline__ void drain() {
    if (!ahead) producer.drain();
  }
};

// A consumer warp's side: it takes every kWarps-th chunk of the step, in order.
template <class Map>
struct Consumer {
  const StepArgs& args;
  Profile profile;
  u32 begin = 0;        // index of the current phase's first chunk
  u32 next;             // index of this warp's next chunk
  int stage;            // where it lands
  u32 parity = 0;
  u32 columns_parity = 0;  // of the ring's barrier for activations

  __device__ __forceinline__ explicit Consumer(const StepArgs& args) : args(args), profile(args), next(threadIdx.x / 32), stage(threadIdx.x / 32) {}

  // Of the next `count` chunks this warp's next, which must be released after use; nullptr: it has no more of them.
  __device__ __forceinline__ const u8* await(u32 count) const {
    if (next >= begin + count) return nullptr;
    wait_parity<Map>(stage, parity, args);
    return Shared<Map>::stage(stage);
  }
  __device__ __forceinline__ void release() {
    mbarrier_arrive(&Shared<Map>::ring().empty[stage]);
    next += kWarps;
    if ((stage += kWarps) >= Map::kStages) { stage -= Map::kStages; parity ^= 1; }
  }
  // Calls use(i, data) for each of the next `count` chunks that is this warp's; i counts from 0.
  template <class Use>
  __device__ __forceinline__ void take(u32 count, Use use) {
#pragma unroll 1
    for (; const u8* data = await(count); release()) use(int(next - begin), data);
    begin += count;
  }
};
