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

// A wait that knows how long it has lasted. Looks at the clock every 256 tries.
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

// All blocks wait for all blocks. After an alarm nobody waits any more: the step runs to its end on
// garbage, the ring empties as usual, and the host throws the result away.
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
      if (!gave_up) wait();
    }
    sync_consumers();
  }

 private:
  __device__ __forceinline__ void wait() {
    Patience patience(args.watchdog_ns);
    while (true) {
      const u32 seen = ld_acquire_gpu(Workspace(args).barrier());
      if ((int)(seen - target) >= 0) return;
      if (patience.tries % 64 == 63 && ld_relaxed_gpu(Workspace(args).abandoned())) break;
      if (patience.over()) {
        raise_alarm(args.alarm, kAlarmGridBarrier, phase, target, seen);
        red_add_release_gpu(Workspace(args).abandoned(), 1);
        break;
      }
    }
    gave_up = true;
  }
};
