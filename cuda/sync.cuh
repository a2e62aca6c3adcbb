// The grid barrier and the watchdog behind every wait.
#pragma once
#include "config.cuh"

// Consumers are the first kConsumers threads of a block; the producer warp never takes part.
__device__ __forceinline__ void sync_consumers() { bar_sync(1, kConsumers); }

// Raises the alarm that the host reads, once: block, phase, expected and seen value.
__device__ __noinline__ void raise_alarm(u32* alarm, u32 kind, u32 phase, u32 expected, u32 seen) {
  if (atom_cas_sys(alarm, 0, kind) != 0) return;
  alarm[1] = blockIdx.x;
  alarm[2] = phase;
  alarm[3] = expected;
  alarm[4] = seen;
  __threadfence_system();
}

// A wait for the ring that knows how long it has lasted. Looks at the clock every 256 tries.
struct Patience {
  u64 limit_ns, start_ns = 0;
  u32 tries = 0;
  __device__ __forceinline__ explicit Patience(u64 limit) : limit_ns(limit) {}
  __device__ __forceinline__ bool over() {
    if (++tries % 256) return false;
    const u64 now = globaltimer_ns();
    if (!start_ns) start_ns = now;
    return now - start_ns > limit_ns;
  }
};

// Waiting for other blocks: looks so far, and since when by the clock, which is read at every 64th.
struct Looks {
  u32 count = 0;
  u64 since_ns = 0;
};
constexpr u64 kGivenUp = ~0ull;

// The new since_ns. Apart from the loops that look, for those are many.
__device__ __noinline__ u64 look_around(const StepArgs& args, u64 since_ns, u32 alarm, u32 phase, u32 expected, u32 seen) {
  u32* abandoned = Workspace(args).abandoned();
  if (ld_relaxed_gpu(abandoned)) return kGivenUp;
  const u64 now = globaltimer_ns();
  if (!since_ns) return now;
  if (now - since_ns <= args.watchdog_ns) return since_ns;
  raise_alarm(args.alarm, alarm, phase, expected, seen);
  red_add_release_gpu(abandoned, 1);
  return kGivenUp;
}

// Waits until so many blocks have arrived; whether it was in vain. Apart from the barriers, for those are many.
__device__ __noinline__ bool await_arrivals(const StepArgs& args, u32 target, u32 phase) {
  const u32* arrivals = Workspace(args).barrier();
  for (Looks looks; looks.since_ns != kGivenUp; looks.count++) {
    const u32 seen = ld_acquire_gpu(arrivals);
    if ((int)(seen - target) >= 0) return false;
    if (looks.count % 64 == 63) looks.since_ns = look_around(args, looks.since_ns, kAlarmGridBarrier, phase, target, seen);
  }
  return true;
}

// All blocks wait for all blocks; only thread 0 looks. After an alarm nobody waits any more: the step runs to
// its end on garbage, the ring empties as usual, and the host throws the result away.
struct GridBarrier {
  const StepArgs& args;
  u32 target;          // arrivals to wait for, counted since the workspace was made; wraps
  u32 phase = 0;
  bool gave_up = false;

  __device__ __forceinline__ explicit GridBarrier(const StepArgs& args) : args(args), target(args.barrier_base) {}

  __device__ __forceinline__ void sync() {
    sync_consumers();
    target += kGrid;
    phase++;
    if (threadIdx.x == 0) {
      red_add_release_gpu(Workspace(args).barrier(), 1);
      if (!gave_up) gave_up = await_arrivals(args, target, phase);
    }
    sync_consumers();
  }

  // After each look that saw too little: whether to stop waiting for other blocks, for the rest of the step.
  __device__ __forceinline__ bool gives_up(Looks& looks, u32 alarm, u32 phase, u32 expected, u32 seen) {
    if (gave_up || ++looks.count % 64) return gave_up;
    looks.since_ns = look_around(args, looks.since_ns, alarm, phase, expected, seen);
    return gave_up = looks.since_ns == kGivenUp;
  }
};
