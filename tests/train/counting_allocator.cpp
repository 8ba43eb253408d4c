// Preloaded into a process (LD_PRELOAD): counts the bytes of its large blocks, of all threads, and
// the most there were. It gives out what glibc gives.

#include <malloc.h>

#include <atomic>
#include <cerrno>
#include <cstddef>

extern "C" {

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void __libc_free(void *);

// Python's objects are smaller, and tensors that matter larger.
static constexpr size_t kLarge = 16384;

static std::atomic<long> in_use{0};
static std::atomic<long> most{0};

static void count(void *block, long sign) {
  const size_t size = block == nullptr ? 0 : malloc_usable_size(block);
  if (size < kLarge) return;
  const long now = in_use.fetch_add(sign * static_cast<long>(size)) + sign * static_cast<long>(size);
  long seen = most.load();
  while (now > seen && !most.compare_exchange_weak(seen, now)) {
  }
}

long counted_bytes() { return in_use.load(); }

// The most since the last call.
long counted_peak() { return most.exchange(in_use.load()); }

void *malloc(size_t size) {
  void *block = __libc_malloc(size);
  count(block, 1);
  return block;
}

void *calloc(size_t items, size_t size) {
  void *block = __libc_calloc(items, size);
  count(block, 1);
  return block;
}

void *realloc(void *old, size_t size) {
  count(old, -1);
  void *block = __libc_realloc(old, size);
  count(block == nullptr && size != 0 ? old : block, 1);
  return block;
}

void *memalign(size_t alignment, size_t size) {
  void *block = __libc_memalign(alignment, size);
  count(block, 1);
  return block;
}

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **place, size_t alignment, size_t size) {
  void *block = memalign(alignment, size);
  if (block == nullptr) return ENOMEM;
  *place = block;
  return 0;
}

void free(void *block) {
  count(block, -1);
  __libc_free(block);
}
}
