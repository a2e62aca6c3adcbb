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
  u64 empty[Map::kStages];       // completes when all lanes of its warp have read it
};

template <class Map>
struct Shared {
  static __device__ __forceinline__ Ring<Map>& ring() { return *reinterpret_cast<Ring<Map>*>(dynamic_smem()); }
  static __device__ __forceinline__ u8* stage(int s) { return dynamic_smem() + Map::kStageData + s * kStageBytes; }
  static __device__ __forceinline__ u8* scratch() { return dynamic_smem() + Map::kScratch; }
};

template <class Map>
__device__ __forceinline__ void init_ring(Ring<Map>& ring) {
#pragma unroll 1
  for (int s = 0; s < Map::kStages; s++) {
    mbarrier_init(&ring.full[s], kBulkCopy ? 1 : 32);
    mbarrier_init(&ring.empty[s], 32);
  }
  fence_mbarrier_init();
}

__device__ __noinline__ void wait_long(u64* barrier, u32 parity, u32* alarm, u64 limit_ns, u32 chunk) {
  Patience patience(limit_ns);
  while (!mbarrier_try_wait_parity(barrier, parity))
    if (patience.over()) {
      raise_alarm(alarm, kAlarmRing, chunk, parity, !parity);
      return;
    }
}
__device__ __forceinline__ void wait_parity(u64* barrier, u32 parity, const StepArgs& args, u32 chunk) {
#pragma unroll 1
  for (int i = 0; i < 64; i++)
    if (mbarrier_try_wait_parity(barrier, parity)) return;
  wait_long(barrier, parity, args.alarm, args.watchdog_ns, chunk);
}

// The producer's side. All lanes of the warp call copy(); with bulk copies lane 0 does the work.
template <class Map>
struct Producer {
  const StepArgs& args;
  int stage = 0, oldest = 0;           // next stage to fill; oldest stage not known to have landed
  u32 parity = 0, oldest_parity = 0;   // of those stages' current round
  int in_flight = 0, issued = 0;       // issued: counts to kStages and stays there

  __device__ __forceinline__ explicit Producer(const StepArgs& args) : args(args) {}

  // Waits until fewer than kMost copies are on their way, and for the stage to be free.
  template <int kMost>
  __device__ __forceinline__ void copy(const u8* src, u32 bytes) {
    static_assert(kMost >= 1 && kMost <= Map::kStages, "a stage cannot be filled twice");
    Ring<Map>& ring = Shared<Map>::ring();
    while (in_flight >= kMost) await_oldest(ring);
    if (issued == Map::kStages) wait_parity(&ring.empty[stage], parity ^ 1, args, stage);
    else issued++;
    start(ring, src, bytes);
    in_flight++;
    if (++stage == Map::kStages) { stage = 0; parity ^= 1; }
  }

  // A block must not exit while copies into its shared memory are on their way.
  __device__ __forceinline__ void drain() {
    while (in_flight) await_oldest(Shared<Map>::ring());
  }

 private:
  __device__ __forceinline__ void await_oldest(Ring<Map>& ring) {
    wait_parity(&ring.full[oldest], oldest_parity, args, oldest);
    in_flight--;
    if (++oldest == Map::kStages) { oldest = 0; oldest_parity ^= 1; }
  }
  __device__ __forceinline__ void start(Ring<Map>& ring, const u8* src, u32 bytes) {
    u8* dst = Shared<Map>::stage(stage);
    if constexpr (kBulkCopy) {
      mbarrier_arrive_expect_tx(&ring.full[stage], bytes);
      cp_async_bulk(dst, src, bytes, &ring.full[stage]);
    } else {
      for (u32 i = threadIdx.x % 32 * 16; i < bytes; i += 512) cp_async_16(dst + i, src + i);
      cp_async_mbarrier_arrive_noinc(&ring.full[stage]);
    }
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

  __device__ __forceinline__ explicit Consumer(const StepArgs& args) : args(args), profile(args), next(threadIdx.x / 32), stage(threadIdx.x / 32) {}

  // Calls use(i, data) for each of the next `count` chunks that is this warp's; i counts from 0.
  template <class Use>
  __device__ __forceinline__ void take(u32 count, Use use) {
    const u32 end = begin + count;
#pragma unroll 1
    for (; next < end; next += kWarps) {
      Ring<Map>& ring = Shared<Map>::ring();
      wait_parity(&ring.full[stage], parity, args, next);
      use(int(next - begin), Shared<Map>::stage(stage));
      mbarrier_arrive(&ring.empty[stage]);
      if ((stage += kWarps) >= Map::kStages) { stage -= Map::kStages; parity ^= 1; }
    }
    begin = end;
  }
};
