// Runs the threads of a CUDA block as fibres of one host thread, one after the other until the next barrier or
// exchange, in a chosen order. Compiled without a sanitizer; tells one, if there is one, what the fibres are.
//
// What ThreadSanitizer is to take for ordered: the launch before all lanes, a barrier after all that any lane of
// its block did before it and before all that follows, all lanes before the end of the launch. Nothing else: not
// the order in which the fibres happen to run, and no exchange within a warp.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

extern "C" {
#define WEAK __attribute__((weak))
WEAK void* __tsan_create_fiber(unsigned);
WEAK void __tsan_switch_to_fiber(void*, unsigned);
WEAK void* __tsan_get_current_fiber();
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
WEAK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}

namespace emulated {

struct Dim3 { unsigned x, y, z; };
struct Place { Dim3 thread, block, block_size, grid; int call; };
thread_local Place* place;
typedef void (*Body)(void** params);
int run(Body, void**, unsigned, unsigned, int, unsigned, int, char*, char*);

namespace {

enum State { READY, AT_BARRIER, AT_EXCHANGE, RETURNED };
enum { STACK = 1 << 18, GUARD = 4096, WARP = 32 };

// setjmp switches without the two system calls of swapcontext, but the sanitizers follow the latter only
const bool watched = __tsan_create_fiber || __sanitizer_start_switch_fiber;

struct Lane {
  Place place;
  ucontext_t context;
  jmp_buf jump;
  bool begun = false;
  char* stack = nullptr;
  void *sanitizer = nullptr, *fake = nullptr;
  State state = READY;
  int line = 0;
  unsigned mask = 0;
  int from = 0;
  uint64_t value = 0, found = 0;
};

char begin_token, end_token;
int skipped;  // line of a barrier that is passed over, 0 for none

// Stacks of the lanes of a block, with a page without access below each where a sanitizer looks on.
char* new_stacks(size_t lanes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char* stacks = (char*)mmap(nullptr, lanes * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (stacks == MAP_FAILED) {
    fprintf(stderr, "no memory for the stacks of %zu lanes\n", lanes);
    abort();
  }
  for (size_t i = 0; watched && i < lanes; ++i) mprotect(stacks + i * STACK, GUARD, PROT_NONE);
  return stacks;
}

struct Block {
  std::vector<Lane> lanes;
  Body body;
  void** params;
  ucontext_t home;
  jmp_buf home_jump;
  void *home_sanitizer = nullptr, *home_fake = nullptr;
  const void* home_stack = nullptr;
  size_t home_size = 0;
  // two take turns: a lane that runs ahead must not seem ordered before one that still leaves the last barrier
  char barrier[2];
  int barriers = 0;
  Lane* current = nullptr;
  char error[256] = "";

  void fail(const char* format, ...) {
    if (error[0]) return;
    va_list list;
    va_start(list, format);
    vsnprintf(error, sizeof error, format, list);
    va_end(list);
  }
  void resume(Lane& lane) {
    current = &lane;
    place = &lane.place;
    if (!watched) {
      if (_setjmp(home_jump)) return;
      if (lane.begun) _longjmp(lane.jump, 1);
      lane.begun = true;
      setcontext(&lane.context);
    }
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(lane.sanitizer, 1);
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&home_fake, lane.stack, STACK);
    swapcontext(&home, &lane.context);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(home_fake, nullptr, nullptr);
  }
  void leave(Lane& lane, bool forever = false) {
    if (!watched) {
      if (forever || !_setjmp(lane.jump)) _longjmp(home_jump, 1);
      return;
    }
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(home_sanitizer, 1);
    if (__sanitizer_start_switch_fiber)
      __sanitizer_start_switch_fiber(forever ? nullptr : &lane.fake, home_stack, home_size);
    swapcontext(&lane.context, &home);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(lane.fake, nullptr, nullptr);
  }
  // Lets the lanes of an exchange go on whose lanes have all come.
  bool exchange(size_t first) {
    const auto lane = [&](int i) -> Lane* { return first + i < lanes.size() ? &lanes[first + i] : nullptr; };
    bool any = false;
    for (int i = 0; i < WARP; ++i) {
      Lane* one = lane(i);
      if (!one || one->state != AT_EXCHANGE) continue;
      const unsigned mask = one->mask;
      if (!(mask >> i & 1)) {
        fail("thread %u exchanges at line %d under a mask that is without it, 0x%x", one->place.thread.x, one->line, mask);
        return false;
      }
      bool complete = true;
      for (int j = 0; j < WARP; ++j)
        if (mask >> j & 1) {
          const Lane* other = lane(j);
          complete &= other && other->state == AT_EXCHANGE && other->mask == mask && other->line == one->line;
        }
      if (!complete) continue;
      for (int j = 0; j < WARP; ++j)
        if (mask >> j & 1) {
          const int from = lane(j)->from;
          if (from >= WARP || from < 0) lane(j)->found = lane(j)->value;  // a shift past the warp: one's own
          else if (mask >> from & 1) lane(j)->found = lane(from)->value;
          else fail("thread %u reads at line %d from lane %d, which the mask 0x%x is without", lane(j)->place.thread.x,
                    lane(j)->line, from, mask);
        }
      for (int j = 0; j < WARP; ++j)
        if (mask >> j & 1) lane(j)->state = READY;
      any = true;
    }
    return any;
  }
  // Lets the lanes of complete exchanges and barriers go on.
  bool settle() {
    bool any = false;
    for (size_t first = 0; first < lanes.size(); first += WARP) any |= exchange(first);
    const auto waits = [](const Lane& l) { return l.state == AT_BARRIER; };
    if (!any && std::all_of(lanes.begin(), lanes.end(), waits)) {
      for (Lane& l : lanes) {
        if (l.line != lanes[0].line)
          fail("thread 0 is at the barrier of line %d, thread %u at that of %d", lanes[0].line, l.place.thread.x, l.line);
        l.state = READY;
      }
      ++barriers;
      any = true;
    }
    return any;
  }
  static void enter(unsigned low, unsigned high);
  void run(const std::vector<int>& order, Place first, char* stacks) {
    home_sanitizer = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr;
    for (size_t i = 0; i < lanes.size(); ++i) {
      Lane& l = lanes[i];
      l.place = first;
      l.place.thread = {unsigned(i), 0, 0};
      l.stack = stacks + i * STACK;
      if (__tsan_create_fiber) l.sanitizer = __tsan_create_fiber(0);
      getcontext(&l.context);
      l.context.uc_stack.ss_sp = l.stack;
      l.context.uc_stack.ss_size = STACK;
      l.context.uc_link = nullptr;
      const uint64_t self = (uint64_t)this;
      makecontext(&l.context, (void (*)())enter, 2, unsigned(self), unsigned(self >> 32));
    }
    size_t left = lanes.size();
    while (left && !error[0]) {
      for (int i : order) {
        if (lanes[i].state != READY || error[0]) continue;
        resume(lanes[i]);
        left -= lanes[i].state == RETURNED;
      }
      if (left && !settle()) {
        const char* what[] = {"goes on", "waits at the barrier", "waits at the exchange", "has returned; last seen"};
        const Lane& a = *std::find_if(lanes.begin(), lanes.end(), [](const Lane& l) { return l.state != RETURNED; });
        for (const Lane& b : lanes)
          if (b.state != a.state || b.line != a.line)
            fail("block %u stands still: thread %u %s of line %d, thread %u %s at line %d", first.block.x,
                 a.place.thread.x, what[a.state], a.line, b.place.thread.x, what[b.state], b.line);
        fail("block %u stands still: thread %u %s of line %d", first.block.x, a.place.thread.x, what[a.state], a.line);
      }
    }
    // ThreadSanitizer's fibres stay: it would give their numbers to those of the next block, and see no race
    // between the two
  }
};

thread_local Block* block;
char message[256];

void Block::enter(unsigned low, unsigned high) {
  Block* self = (Block*)(low | (uint64_t)high << 32);
  Lane& lane = *self->current;
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &self->home_stack, &self->home_size);
  if (__tsan_acquire) __tsan_acquire(&begin_token);
  self->body(self->params);
  if (__tsan_release) __tsan_release(&end_token);
  lane.state = RETURNED;
  self->leave(lane, true);
}

}  // namespace

void sync_block(int line) {
  Lane& lane = *block->current;
  if (lane.place.call) line = lane.place.call;
  lane.place.call = 0;
  if (line == skipped) return;
  char* token = &block->barrier[block->barriers % 2];
  lane.state = AT_BARRIER;
  lane.line = line;
  if (__tsan_release) __tsan_release(token);
  block->leave(lane);
  if (__tsan_acquire) __tsan_acquire(token);
}

uint64_t sync_warp(unsigned mask, int from, uint64_t value, int line) {
  Lane& lane = *block->current;
  lane.state = AT_EXCHANGE;
  lane.line = line;
  lane.mask = mask;
  lane.from = from;
  lane.value = value;
  block->leave(lane);
  return lane.found;
}

[[noreturn]] void refuse(const char* expression, const char* file, int line) {
  Lane& lane = *block->current;
  const char* name = strrchr(file, '/');
  block->fail("block %u, thread %u: not so, %s:%d: %s", lane.place.block.x, lane.place.thread.x, name ? name + 1 : file, line,
              expression);
  if (__tsan_release) __tsan_release(&end_token);
  lane.state = RETURNED;
  block->leave(lane, true);
  abort();
}

// order: 0 the lanes and blocks as they are numbered, 1 backwards, 2 shuffled by the seed
int run(Body body, void** params, unsigned blocks, unsigned threads, int order, unsigned seed, int skip, char* begin,
        char* end) {
  std::mt19937 draw(seed);
  const auto ordered = [&](unsigned count) {
    std::vector<int> all(count);
    for (unsigned i = 0; i < count; ++i) all[i] = order == 1 ? count - 1 - i : i;
    if (order == 2) std::shuffle(all.begin(), all.end(), draw);
    return all;
  };
  message[0] = 0;
  skipped = skip;
  char* stacks = nullptr;
  if (__tsan_release) __tsan_release(&begin_token);
  for (int number : ordered(blocks)) {
    if (begin != end) memset(begin, 0xff, end - begin);  // NaN
    const std::vector<int> lanes = ordered(threads);
    const auto go = [&] {
      Block& own = *(block = new Block);
      own.lanes.resize(threads);
      own.body = body;
      own.params = params;
      if (!stacks) stacks = new_stacks(threads);
      own.run(lanes, {{}, {unsigned(number), 0, 0}, {threads, 1, 1}, {blocks, 1, 1}, 0}, stacks);
      memcpy(message, own.error, sizeof message);
      // ThreadSanitizer would see the lanes' last reads race with the end of their block
      if (!__tsan_create_fiber) delete &own;
    };
    if (__tsan_create_fiber) std::thread(go).join();
    else go();
    if (__tsan_create_fiber) stacks = nullptr;  // and those of its stacks
    if (message[0]) break;
  }
  if (stacks) munmap(stacks, threads * size_t(STACK));
  if (__tsan_acquire) __tsan_acquire(&end_token);
  return message[0] != 0;
}

extern "C" const char* emulated_message() { return message; }

}  // namespace emulated

// Warp's headers in their form for CPUs ask for it
extern "C" void _wp_assert(const char* expression, const char* file, unsigned line) {
  fprintf(stderr, "%s:%u: %s\n", file, line, expression);
  abort();
}
