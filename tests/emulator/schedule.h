// Which fiber of a block runs next, and what happens when none can.
#pragma once
#include <sched.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "block.h"

namespace emulated {

[[noreturn]] static void leave(Block& b) {
  switch_context(self().context, b.host, true);
  std::abort();
}

void fail(const char* format, ...) {
  Block& b = *block;
  Fiber& f = self();
  int n = snprintf(b.message, sizeof(b.message), "block %u warp %u lane %u: ", b.index, f.warp, f.lane);
  va_list rest;
  va_start(rest, format);
  vsnprintf(b.message + n, sizeof(b.message) - (size_t)n, format, rest);
  va_end(rest);
  b.launch.failed.store(true);
  leave(b);
}

static void make_ready(Block& b, u32 warp, u32 lanes) {
  b.ready[warp] |= lanes;
  if (lanes != 0) b.ready_warps |= 1u << warp;
  b.waiting[warp] &= ~lanes;
  b.spinning[warp] &= ~lanes;
}

// The set bit to visit after `at`, in the launch's order.
static u32 pick(Block& b, u32 bits, u32 at) {
  if (b.launch.order == Order::random) {
    for (u32 skip = b.random() % (u32)__builtin_popcount(bits); skip != 0; skip--) bits &= bits - 1;
    return (u32)__builtin_ctz(bits);
  }
  if (b.launch.order == Order::forward) {
    u32 after = at == 31 ? 0 : bits & (~0u << (at + 1));
    return (u32)__builtin_ctz(after != 0 ? after : bits);
  }
  u32 before = bits & ((1u << at) - 1);
  return 31 - (u32)__builtin_clz(before != 0 ? before : bits);
}

static bool spun_value_changed(const Fiber& f) {
  for (u32 i = 0; i < f.n_polled; i++)
    if (__atomic_load_n(f.polled[i].p, __ATOMIC_RELAXED) != f.polled[i].value) return true;
  return false;
}

static bool wake_spinners(Block& b, bool all) {
  bool any = false;
  for (u32 w = 0; w < b.warps; w++)
    for (u32 lanes = b.spinning[w]; lanes != 0; lanes &= lanes - 1) {
      u32 lane = (u32)__builtin_ctz(lanes);
      bool changed = spun_value_changed(b.fiber[w * 32 + lane]);
      if (changed) step(b);
      if (changed || all) make_ready(b, w, 1u << lane), any = true;
    }
  return any;
}

static bool anyone_waits(const Block& b) {
  u32 any = 0;
  for (u32 w = 0; w < b.warps; w++) any |= b.waiting[w];
  return any != 0;
}

// All blocks have been quiet, and nothing has changed anywhere, for the time limit.
static bool deadlocked(Block& b) {
  u64 steps = 0, now = now_ns();
  for (Block* other : b.launch.blocks) {
    if (!other->quiet.load() && !other->finished.load()) return b.quiet_since = now, false;
    steps += other->steps.load();
  }
  if (steps != b.seen_steps || b.quiet_since == 0) return b.seen_steps = steps, b.quiet_since = now, false;
  return now - b.quiet_since > b.launch.timeout_ns;
}

// Nothing can run in this block. Now and then every poller is let go once, as try_wait does after a while on
// the device: the kernel's own watchdog must run.
static void idle(Block& b) {
  b.quiet.store(true);
  if (++b.idle_rounds % 16 != 0) return (void)sched_yield();
  if (b.idle_rounds > 1024) usleep(100);
  if (deadlocked(b)) {
    b.launch.deadlock.store(true);
    return b.launch.failed.store(true);
  }
  wake_spinners(b, true);
  for (u32 w = 0; w < b.warps; w++) make_ready(b, w, b.waiting[w]);
}

static void land_one(Block& b);

// The fiber to run next; null when the launch has failed.
static Fiber* choose(Block& b) {
  const Fiber& me = self();
  if (b.launch.eager != 0 && !b.in_flight.empty() && b.random() < b.launch.eager && anyone_waits(b)) land_one(b);
  while (b.ready_warps == 0) {
    if (b.launch.failed.load(std::memory_order_relaxed)) return nullptr;
    if (!b.in_flight.empty() && anyone_waits(b)) land_one(b);
    else if (!wake_spinners(b, false)) idle(b);
  }
  const bool greedy = b.launch.order != Order::random || b.random() % 4 != 0;
  u32 warp = b.ready[me.warp] != 0 && greedy ? me.warp : pick(b, b.ready_warps, me.warp);
  u32 lane = pick(b, b.ready[warp], me.lane);
  return &b.fiber[warp * 32 + lane];
}

static void run_next(Block& b, bool last = false) {
  Fiber& me = self();
  Fiber* next = choose(b);
  if (next == nullptr) leave(b);
  if (next == &me) return;
  current = next;
  switch_context(me.context, next->context, last);
}

// In the random order others may run after what this fiber has just told them, although it could go on.
static void let_others_run(Block& b) {
  if (b.launch.order == Order::random && b.random() % 4 == 0) run_next(b);
}

// The current fiber stops here until somebody makes it ready.
static void wait(Block& b, State why) {
  Fiber& f = self();
  f.state = why;
  b.ready[f.warp] &= ~(1u << f.lane);
  if (b.ready[f.warp] == 0) b.ready_warps &= ~(1u << f.warp);
  if (why == State::mbarrier || why == State::copies) b.waiting[f.warp] |= 1u << f.lane;
  if (why == State::spin) b.spinning[f.warp] |= 1u << f.lane;
  run_next(b);
  f.state = State::ready;
}

}  // namespace emulated
