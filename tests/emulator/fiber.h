// Fibers: stacks, the switch between them, and what the sanitizers must be told about both.
// swapcontext makes a system call each time; the assembly below is ten times as fast.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#if !defined(EMULATED_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define EMULATED_UCONTEXT
#endif
#ifdef EMULATED_UCONTEXT
#include <ucontext.h>
#endif

#ifdef EMULATED_THREAD_SANITIZER
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);   // 1: the switch orders no memory accesses
void* __tsan_get_current_fiber();
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
}
#define TSAN(call) call
#else
#define TSAN(call) (void)0
#endif
#ifdef EMULATED_ADDRESS_SANITIZER
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_bytes);
void __asan_unpoison_memory_region(const volatile void* address, size_t bytes);
void* __asan_region_is_poisoned(void* address, size_t bytes);
}
#define ASAN(call) call
#else
#define ASAN(call) (void)0
#endif

namespace emulated {

#if defined(EMULATED_UCONTEXT)
#elif defined(__x86_64__)
// Pushes what a callee must keep, swaps the stack pointers, pops. The last word of a new stack is the entry.
asm(R"(
.text
.p2align 4
.local emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch, . - emulated_switch
)");
constexpr int kSavedWords = 8, kEntryWord = 6;   // one word above the entry keeps the stack aligned as after a call
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.local emulated_switch
.type emulated_switch, %function
emulated_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulated_switch, . - emulated_switch
)");
constexpr int kSavedWords = 20, kEntryWord = 11;
#endif
#ifndef EMULATED_UCONTEXT
extern "C" void emulated_switch(void** save_stack_pointer, void* load_stack_pointer);
#endif

constexpr size_t kStackBytes = 256 * 1024;   // reserved, not touched: a page becomes real when it is used

// What can be switched to. The host is the OS thread's own stack.
struct Context {
#ifndef EMULATED_UCONTEXT
  void* stack_pointer = nullptr;
#else
  ucontext_t machine;
#endif
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;       // AddressSanitizer
  void* sanitizer_fiber = nullptr;  // ThreadSanitizer

  void prepare(char* stack, void (*entry)()) {
    bottom = stack, bytes = kStackBytes;
    TSAN(sanitizer_fiber = __tsan_create_fiber(0));
#ifndef EMULATED_UCONTEXT
    void** words = reinterpret_cast<void**>(stack + kStackBytes) - kSavedWords;
    words[kEntryWord] = reinterpret_cast<void*>(entry);
    stack_pointer = words;
#else
    getcontext(&machine);
    machine.uc_stack.ss_sp = stack;
    machine.uc_stack.ss_size = kStackBytes;
    machine.uc_link = nullptr;
    makecontext(&machine, entry, 0);
#endif
  }
};

// Goes from one context to another; comes back when somebody switches to `from`. A context that will never
// be resumed says so, for AddressSanitizer to drop what it keeps of its stack.
inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool last = false) {
  ASAN(__sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.bytes));
  TSAN(__tsan_switch_to_fiber(to.sanitizer_fiber, 1));
#ifndef EMULATED_UCONTEXT
  emulated_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.machine, &to.machine);
#endif
  ASAN(__sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr));
}

// The stacks of a block: one mapping, a page without access below each. Making one takes as long as a small launch,
// so they are kept for the next launch, of whichever module.
struct Stacks {
  char* base;
  size_t count;
  static size_t guard() { return (size_t)sysconf(_SC_PAGESIZE); }
  static char* map(size_t n) {
    const size_t each = kStackBytes + guard();
    void* p = mmap(nullptr, n * each, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    for (size_t i = 0; i < n; i++) mprotect(static_cast<char*>(p) + i * each, guard(), PROT_NONE);
    return static_cast<char*>(p);
  }
  char* stack(size_t i) const { return base + i * (kStackBytes + guard()) + guard(); }
  ~Stacks() { ASAN(__asan_unpoison_memory_region(base, base == nullptr ? 0 : count * (kStackBytes + guard()))); }
};

}  // namespace emulated
