// The emulated device: one OS thread is a block, one fiber is a CUDA thread.
//
// A block's fibers switch only where they wait, so a warp runs ahead until it blocks and a forgotten barrier shows
// as a wrong result; in the random order they also switch after arrivals and atomics. Asynchronous copies land only while a fiber waits on an mbarrier, in random order, over poison;
// by chance they read their source when issued or when they land.
// This program is compiled without sanitizers: to ThreadSanitizer every fiber is a thread of its own, and only the
// barriers announced to it (TSAN lines) order their memory accesses.
#include <cstring>
#include <memory>
#include <thread>

#include "barriers.h"
#include "copies.h"

namespace emulated {

// --- Global memory and time -----------------------------------------------------------------------------------------

void before_poll(const u32* p) {
  Fiber& f = self();
  for (u32 i = 0; i < f.n_polled; i++)
    if (f.polled[i].p == p && __atomic_load_n(p, __ATOMIC_RELAXED) == f.polled[i].value) {
      wait(*block, State::spin);
      f.n_polled = 0;
    }
}
void after_poll(const u32* p, u32 seen) {
  Fiber& f = self();
  for (u32 i = 0; i < f.n_polled; i++)
    if (f.polled[i].p == p) return (void)(f.polled[i].value = seen);
  if (f.n_polled == kPolled) f.n_polled = 0;
  f.polled[f.n_polled++] = {p, seen};
}
void progress() {
  self().n_polled = 0;
  step(*block);
  let_others_run(*block);
}
void pause() {
  wait(*block, State::spin);
  self().n_polled = 0;
}
void thread_fence() {
  [[maybe_unused]] static u64 order;
  TSAN(__tsan_release(&order));
  TSAN(__tsan_acquire(&order));
}
u64 clock_ns() { return now_ns(); }

// --- Launch ---------------------------------------------------------------------------------------------------------

static void end_fiber(Block& b) {
  Fiber& f = self();
  f.state = State::done;
  b.live[f.warp] &= ~(1u << f.lane);
  b.ready[f.warp] &= ~(1u << f.lane);
  if (b.ready[f.warp] == 0) b.ready_warps &= ~(1u << f.warp);
  TSAN(__tsan_release(&b.order_at_exit));
  step(b);
  if (--b.live_threads == 0) leave(b);
  Gate& whole = b.gate[0];   // __syncthreads waits for those that have not ended
  if (whole.expected < 0 && whole.arrived == b.live_threads) open_gate(b, whole);
  for (WarpGate& g : b.warp_gate[f.warp])
    if (g.arrived != 0 && g.arrived == (g.mask & b.live[f.warp])) complete(b, f.warp, g);
  run_next(b, true);
}

static void entry() {
  ASAN(__sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr));
  block->launch.kernel(block->launch.args);
  end_fiber(*block);
}

Block::Block(Launch& l, u32 i)
    : launch(l), index(i), live_threads(l.threads), warps(l.threads / 32), fiber(l.threads),
      mbarrier_set(l.smem_bytes / 512 + 1), landing(l.smem_bytes / 1024 + 1), snapshot(l.smem_bytes),
      random_state((l.seed + 1) * 0x9e3779b97f4a7c15u + i * 0xbf58476d1ce4e5b9u) {
  // Room for all that can be at once: fibers must not allocate, or sanitizers would see an unordered use of the heap.
  in_flight.reserve(l.smem_bytes / 16 + 1);
  arrivals.reserve(l.smem_bytes / 16 + 4 * l.threads);
  for (u32 w = 0; w < warps; w++) warp_gate[w].reserve(32);
}

static std::string describe(const Block& b, const Fiber& f) {
  char text[256] = "";
  if (b.ready[f.warp] >> f.lane & 1) return "could run";
  if (f.state == State::done) return "ended";
  if (f.state == State::warp) {
    u32 arrived = 0;
    for (const WarpGate& g : b.warp_gate[f.warp])
      if (g.mask == f.number) arrived = g.arrived;
    snprintf(text, sizeof(text), "%s with mask %08x, lanes that came: %08x", name(f.exchange), f.number, arrived);
  }
  if (f.state == State::barrier) {
    const Gate& g = b.gate[f.number];
    int expected = g.expected < 0 ? (int)b.live_threads : g.expected;
    snprintf(text, sizeof(text), "barrier %u, %u of %d threads came", f.number, g.arrived, expected);
  }
  if (f.state == State::mbarrier) {
    const Mbarrier& m = *reinterpret_cast<const Mbarrier*>(f.mbarrier);
    snprintf(text, sizeof(text), "mbarrier at offset %u for parity %u (%u of %u arrivals missing, %d bytes to land)",
             (u32)(reinterpret_cast<const u8*>(f.mbarrier) - b.smem), f.number, (u32)m.pending, (u32)m.expected,
             (int)m.bytes);
  }
  if (f.state == State::copies) snprintf(text, sizeof(text), "cp_async_wait_group, %u of its copies to land", f.unlanded);
  if (f.state == State::spin && f.n_polled == 0) return "__nanosleep";
  if (f.state == State::spin)
    for (u32 i = 0, n = 0; i < f.n_polled; i++)
      n += (u32)snprintf(text + n, sizeof(text) - n, "%sspin on %p, which holds %u", i ? ", " : "",
                         (const void*)f.polled[i].p, f.polled[i].value);
  return text;
}

// One line for neighbouring lanes that wait for the same thing.
static std::string describe(const Block& b) {
  std::string report;
  for (u32 t = 0, end; t < b.launch.threads; t = end) {
    const std::string what = describe(b, b.fiber[t]);
    for (end = t + 1; end < b.launch.threads && end % 32 != 0 && describe(b, b.fiber[end]) == what;) end++;
    if (b.fiber[t].state == State::done) continue;
    char line[400];
    snprintf(line, sizeof(line), "block %u warp %u lanes %u-%u: %s\n", b.index, t / 32, t % 32, (end - 1) % 32, what.c_str());
    report += line;
  }
  const std::string block = "block " + std::to_string(b.index);
  if (!b.in_flight.empty()) report += block + ": " + std::to_string(b.in_flight.size()) + " copies in flight that nobody waits for\n";
  return report;
}

static void finish(Block& b) {
  const u8* end = b.smem + b.launch.smem_bytes;
  bool overrun = false;
#ifndef EMULATED_ADDRESS_SANITIZER
  for (u32 i = 0; i < kCanaryBytes; i++) overrun |= end[i] != kCanary;
#endif
  char text[200] = "";
  if (b.message[0] != 0) b.report = std::string(b.message) + "\n";
  else if (b.live_threads != 0 && b.launch.deadlock.load()) b.report = describe(b);
  else if (b.live_threads == 0 && !b.in_flight.empty() && !b.launch.allow_unlanded)
    snprintf(text, sizeof(text), "block %u ended with %zu copies in flight\n", b.index, b.in_flight.size());
  b.report += text;
  if (overrun) b.report += "block " + std::to_string(b.index) + " wrote past the end of its shared memory\n";
  if (!b.report.empty()) b.launch.failed.store(true);
}

static u8* new_smem(u64 bytes) {
  u64 canary = 0;
#ifndef EMULATED_ADDRESS_SANITIZER
  canary = kCanaryBytes;
#endif
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes + canary + (bytes + canary == 0)) != 0) return nullptr;
  memset(p, kPoison, bytes);
  memset(static_cast<u8*>(p) + bytes, kCanary, canary);
  return static_cast<u8*>(p);
}

#ifdef EMULATED_THREAD_SANITIZER
static void name_fiber(const Fiber& f) {
  char text[64];
  snprintf(text, sizeof(text), "block %u warp %u lane %u", f.block.x, f.warp, f.lane);
  __tsan_set_fiber_name(f.context.sanitizer_fiber, text);
}
#endif

static void run_block(Block& b) {
  const Stacks stacks{b.launch.stacks[b.index], b.launch.threads};
  std::unique_ptr<u8, void (*)(void*)> smem(new_smem(b.launch.smem_bytes), free);
  if (stacks.base == nullptr || smem == nullptr) {
    snprintf(b.message, sizeof(b.message), "block %u: no memory for %u fibers", b.index, b.launch.threads);
    b.launch.failed.store(true);
    b.report = b.message;
    b.finished.store(true);
    return;
  }
  block = &b;
  b.smem = smem.get();
  pthread_attr_t attributes;
  void* bottom = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &b.host.bytes);
  pthread_attr_destroy(&attributes);
  b.host.bottom = bottom;
  TSAN(b.host.sanitizer_fiber = __tsan_get_current_fiber());
  for (u32 t = 0; t < b.launch.threads; t++) {
    Fiber& f = b.fiber[t];
    static_cast<Thread&>(f) = {{t, 0, 0}, {b.index, 0, 0}, {b.launch.threads, 1, 1}, {b.launch.grid, 1, 1}};
    f.warp = t / 32, f.lane = t % 32;
    f.context.prepare(stacks.stack(t), entry);
    TSAN(name_fiber(f));
  }
  for (u32 w = 0; w < b.warps; w++) b.live[w] = ~0u, make_ready(b, w, ~0u);
  Fiber& first = b.fiber[pick(b, b.ready_warps, 31) * 32 + pick(b, ~0u, 31)];
  current = &first;
  switch_context(b.host, first.context);
  TSAN(__tsan_acquire(&b.order_at_exit));
  finish(b);
  b.finished.store(true);
  for ([[maybe_unused]] Fiber& f : b.fiber) TSAN(__tsan_destroy_fiber(f.context.sanitizer_fiber));
  block = nullptr, current = nullptr;
}

}  // namespace emulated

// Stacks for one block of so many threads, or null.
extern "C" __attribute__((visibility("default"))) void* emulated_new_stacks(unsigned threads) {
  return emulated::Stacks::map(threads);
}

// Runs a kernel to its end. Returns 0, or 1 with a report.
extern "C" __attribute__((visibility("default"))) int emulated_launch(
    void (*kernel)(const void*), const void* args, unsigned long long args_bytes, unsigned grid, unsigned threads,
    unsigned long long smem_bytes, int order, unsigned long long seed, double timeout_s, int allow_unlanded, char* report,
    unsigned long long report_bytes, char* const* stacks) {
  using namespace emulated;
  struct alignas(128) Line { u8 byte[128]; };
  std::vector<Line> aligned(args_bytes / sizeof(Line) + 1);
  memcpy(aligned.data(), args, args_bytes);
  const u32 eager = (const u32[]){0, 1u << 29, 1u << 31}[seed % 3];
  const u64 timeout_ns = (u64)(timeout_s * 1e9);
  Launch launch{kernel, aligned.data(), grid, threads, smem_bytes, Order(order), seed, timeout_ns, allow_unlanded != 0, eager, stacks, {}};
  std::vector<std::unique_ptr<Block>> blocks;
  for (u32 i = 0; i < grid; i++) blocks.push_back(std::make_unique<Block>(launch, i)), launch.blocks.push_back(blocks[i].get());
  std::vector<std::thread> running;
  for (auto& b : blocks) running.emplace_back([&b] { run_block(*b); });
  for (std::thread& t : running) t.join();
  std::string all = launch.deadlock.load() ? "deadlock: nothing changed for " + std::to_string(timeout_s) + " s\n" : "";
  for (auto& b : blocks) all += b->report;
  snprintf(report, report_bytes, "%s", all.c_str());
  return launch.failed.load() ? 1 : 0;
}
