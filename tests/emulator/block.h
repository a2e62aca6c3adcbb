// The state of an emulated block: its fibers, barriers and copies in flight.
#pragma once
#include <time.h>

#include <atomic>
#include <string>
#include <vector>

#include "emulated_runtime.h"
#include "fiber.h"

namespace emulated {

constexpr u32 kWarps = 32, kBarriers = 16, kPolled = 64, kCanaryBytes = 256, kGroups = 16;
constexpr u8 kPoison = 0xff, kCanary = 0xa5;   // 0xff...: NaN in every float format

enum class State : u8 { ready, warp, barrier, mbarrier, copies, spin, done };
enum class Order : int { forward, reverse, random };

struct Fiber : Thread {
  Context context;
  State state = State::ready;
  u32 warp = 0, lane = 0;
  u32 number = 0;                                   // of the barrier, the parity, or the mask
  u64* mbarrier = nullptr;
  Exchange exchange = Exchange::warp_barrier;
  struct Polled { const u32* p; u32 value; } polled[kPolled];
  u32 n_polled = 0;
  u32 unlanded = 0;                                 // its cp_async_16 in flight
  u64 wanted_groups = 0;                            // that it waits for
  u64 groups = 0;                                   // that it committed: what it copies now belongs to this one
  u32 group_unlanded[kGroups] = {};
};

struct Gate {
  u32 arrived = 0, generation = 0, waiters[kWarps] = {};
  int expected = 0;
  u64 order[2] = {};                                // two addresses, so that the next generation orders nothing of this one
};

struct WarpGate {
  u32 mask = 0, arrived = 0, generation = 0;
  Exchange what = Exchange::warp_barrier;
  u64 order[2] = {};
  Slot slot[2][32];                                 // by generation: a lane that runs ahead must not overwrite what others read
};

// The 64 bits of an mbarrier.
struct Mbarrier { u64 expected : 20, pending : 20; long long bytes : 23; u64 phase : 1; };
static_assert(sizeof(Mbarrier) == 8);

struct Copy { u8* dst; const u8* src; u32 bytes; u64* mbarrier; u32 fiber; u64 number, group; };   // src: what lands, perhaps a snapshot
struct CopyArrival { u64* mbarrier; u32 fiber, remaining; u64 before; };

struct Block;
struct Launch {
  void (*kernel)(const void*);
  const void* args;
  u32 grid, threads;
  u64 smem_bytes;
  Order order;
  u64 seed, timeout_ns;
  bool allow_unlanded;
  u32 eager;                                        // chance (of 2^32) that a copy lands although somebody can run
  char* const* stacks;                              // [grid], of emulated_new_stacks
  std::vector<Block*> blocks;
  std::atomic<bool> failed{false}, deadlock{false};
};

struct Block {
  Launch& launch;
  u32 index, live_threads, warps, ready_warps = 0;
  u32 live[kWarps] = {}, ready[kWarps] = {}, waiting[kWarps] = {}, spinning[kWarps] = {};
  std::vector<Fiber> fiber;
  Gate gate[kBarriers];
  std::vector<WarpGate> warp_gate[kWarps];
  Context host;
  u8* smem = nullptr;
  std::vector<u64> mbarrier_set, landing;           // bits: 8-byte places that are mbarriers, 16-byte places a copy is in flight to
  std::vector<u8> snapshot;                         // by destination: sources of copies that read theirs when issued
  std::vector<Copy> in_flight;
  std::vector<CopyArrival> arrivals;
  u64 copies = 0, random_state, order_at_exit = 0;
  std::atomic<u64> steps{0};                        // every change that may let another fiber go on
  std::atomic<bool> quiet{false}, finished{false};
  u32 idle_rounds = 0;
  u64 seen_steps = 0, quiet_since = 0;
  char message[1024] = "";
  std::string report;

  Block(Launch& l, u32 i);
  u32 random() {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return (u32)(random_state >> 32);
  }
};

thread_local Thread* current;
static thread_local Block* block;

static Fiber& self() { return *static_cast<Fiber*>(current); }

static u64 now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (u64)t.tv_sec * 1000000000u + (u64)t.tv_nsec;
}

static void step(Block& b) {
  b.steps.store(b.steps.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  b.quiet.store(false, std::memory_order_relaxed);
  b.idle_rounds = 0;
}

}  // namespace emulated
