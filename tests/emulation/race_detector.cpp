#include "race_detector.h"

#include <dlfcn.h>
#include <link.h>

#include <array>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "fibers.h"

namespace emulation::races {
namespace {

constexpr uintptr_t kPage = 4096, kCellBytes = 2;  // the smallest element that a kernel touches
constexpr size_t kMostReports = 50;

// What is remembered of two bytes of memory. All of it is of one launch.
struct Cell {
  uint32_t launch = 0;
  uint32_t writer_block, writer_epoch;  // of the last write
  uint32_t reader_block, reader_epoch;  // of the last read
  uint16_t writer_thread, reader_thread;
  bool written, written_atomically, read;
  bool other_threads_read;  // in the reader's epoch
  bool other_blocks_read;
  bool read_only;  // through the read-only cache
};

struct Page {
  uintptr_t begin, end;  // what of it is watched
  bool is_shared;
  std::array<Cell, kPage / kCellBytes> cells{};
};

struct Report {
  std::string text;
  const void* kernel;
};

struct Detector {
  bool running = false;
  uint32_t launch = 0, block = 0, epoch = 0;
  uint16_t thread = 0;
  const void* kernel = nullptr;

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  // Of pages that were asked for last; null: nobody watches them.
  struct Remembered {
    uintptr_t page = 0;
    Page* found = nullptr;
  };
  std::array<Remembered, 256> remembered;

  std::vector<Report> reports;
  std::set<std::pair<std::string, const void*>> known;
  std::set<const void*> launched;

  Page* page_of(uintptr_t address) {
    const uintptr_t page = address / kPage;
    Remembered& slot = remembered[page % remembered.size()];
    if (slot.page != page) {
      const auto found = pages.find(page);
      slot = {page, found == pages.end() ? nullptr : found->second.get()};
    }
    return slot.found;
  }

  void add_pages(uintptr_t begin, uintptr_t end, bool is_shared) {
    for (uintptr_t page = begin / kPage; page * kPage < end; ++page) {
      std::unique_ptr<Page>& cells = pages[page];
      cells = std::make_unique<Page>();
      cells->begin = begin;
      cells->end = end;
      cells->is_shared = is_shared;
    }
    remembered.fill({});
  }

  void report(const char* what, bool is_shared) {
    const std::string text =
        std::string(what) + (is_shared ? " (shared memory)" : " (global memory)");
    if (reports.size() < kMostReports && known.insert({text, kernel}).second)
      reports.push_back(
          {text + ", first thread " + std::to_string(thread) + " of block " + std::to_string(block),
           kernel});
  }

  // Whether an earlier access to global memory is unordered with one that is made now.
  bool is_unordered(uint32_t other_block, uint32_t other_epoch, bool other_thread) const {
    return other_block != block || (other_epoch == epoch && other_thread);
  }

  void look_at_cell(Cell& cell, bool is_shared, Access access) {
    if (cell.launch != launch) {
      cell = {};
      cell.launch = launch;
    }
    if (is_shared) {  // every block has its own
      if (cell.written && cell.writer_block != block) cell.written = false;
      if (cell.read && cell.reader_block != block) cell.read = cell.other_threads_read = false;
    }
    const bool writes = access == Access::kWrite || access == Access::kAtomic;
    const bool both_atomic = access == Access::kAtomic && cell.written_atomically;
    if (cell.written && !both_atomic &&
        is_unordered(cell.writer_block, cell.writer_epoch, cell.writer_thread != thread))
      report(
          writes ? "race: two threads write one place" : "race: a thread reads what another wrote",
          is_shared);
    if (writes && cell.read &&
        (cell.other_blocks_read ||
         is_unordered(cell.reader_block, cell.reader_epoch,
                      cell.reader_thread != thread || cell.other_threads_read)))
      report("race: a thread writes what another read", is_shared);
    if (writes ? cell.read_only : access == Access::kReadOnlyCache && cell.written)
      report("what is written in the launch goes through the read-only cache", is_shared);
    if (is_shared && !writes && !cell.written) report("read before it is written", is_shared);

    if (writes) {
      cell.written_atomically = access == Access::kAtomic;
      cell.written = true;
      cell.writer_block = block;
      cell.writer_epoch = epoch;
      cell.writer_thread = thread;
      return;
    }
    const bool same_epoch = cell.read && cell.reader_block == block && cell.reader_epoch == epoch;
    cell.other_blocks_read |= cell.read && cell.reader_block != block;
    cell.other_threads_read =
        same_epoch && (cell.other_threads_read || cell.reader_thread != thread);
    cell.read_only |= access == Access::kReadOnlyCache;
    cell.read = true;
    cell.reader_block = block;
    cell.reader_epoch = epoch;
    cell.reader_thread = thread;
  }

  void look(uintptr_t address, size_t bytes, Access access, bool is_aligned_type) {
    for (uintptr_t at = address; at < address + bytes; at += kCellBytes) {
      Page* page = page_of(at);
      if (page == nullptr || at < page->begin || at >= page->end) return;
      if (at == address && is_aligned_type && address % bytes != 0)
        fail("a misaligned access");  // which may end the program, if it were made
      look_at_cell(page->cells[at % kPage / kCellBytes], page->is_shared, access);
    }
  }
};

Detector& detector() {
  static Detector& one = *new Detector;  // never destroyed: hooks come until the process ends
  return one;
}

// The .bss of this library: what is in memory and not in the file, at the end of a segment.
int watch_shared_memory(dl_phdr_info* info, size_t, void* own_base) {
  if (reinterpret_cast<void*>(info->dlpi_addr) != own_base) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD || segment.p_memsz == segment.p_filesz) continue;
    const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    detector().add_pages(begin + segment.p_filesz, begin + segment.p_memsz, true);
  }
  return 1;
}

const char* own_base() {
  Dl_info info;
  dladdr(reinterpret_cast<const void*>(&watch_shared_memory), &info);
  return static_cast<const char*>(info.dli_fbase);
}

int64_t offset_in_library(const void* kernel) {
  return static_cast<const char*>(kernel) - own_base();
}

}  // namespace

void watch(const void* begin, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  detector().add_pages(first, first + bytes, false);
}

void unwatch(const void* begin, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  for (uintptr_t page = first / kPage; page * kPage < first + bytes; ++page)
    detector().pages.erase(page);
  detector().remembered.fill({});
}

void start_launch(const void* kernel) {
  Detector& d = detector();
  if (d.launch++ == 0) dl_iterate_phdr(watch_shared_memory, const_cast<char*>(own_base()));
  d.kernel = kernel;
  d.launched.insert(kernel);
}

void start_block(unsigned block) {
  detector().block = block;
  detector().epoch = 0;
}

void pass_barrier() { ++detector().epoch; }

void enter(int thread) {
  detector().thread = static_cast<uint16_t>(thread);
  detector().running = true;
}

void leave() { detector().running = false; }

void look(const void* address, size_t bytes, Access access, bool is_aligned_type) {
  Detector& d = detector();
  if (!d.running) return;
  d.running = false;  // the linker may have chosen an instrumented copy of what is used in here
  d.look(reinterpret_cast<uintptr_t>(address), bytes, access, is_aligned_type);
  d.running = true;
}

}  // namespace emulation::races

// ------------------------------------------------------------------- what the tests ask of it

extern "C" {

int race_reports() { return static_cast<int>(emulation::races::detector().reports.size()); }

const char* race_report(int index) {
  return emulation::races::detector().reports[index].text.c_str();
}

// Where the kernel's code begins in the library: the symbol table has its name.
int64_t race_report_kernel(int index) {
  return emulation::races::offset_in_library(emulation::races::detector().reports[index].kernel);
}

void forget_race_reports() {
  emulation::races::detector().reports.clear();
  emulation::races::detector().known.clear();
}

// The kernels that have run since it was asked last; returns how many, and writes at most `room` of
// them.
int launched_kernels(int64_t* offsets, int room) {
  int count = 0;
  for (const void* kernel : emulation::races::detector().launched) {
    if (count < room) offsets[count] = emulation::races::offset_in_library(kernel);
    ++count;
  }
  emulation::races::detector().launched.clear();
  return count;
}
}

// ------------------------------------------------------------------------ the compiler's hooks

using emulation::races::Access;
using emulation::races::look;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, size_t bytes) { look(address, bytes, Access::kRead, false); }
void __tsan_write_range(void* address, size_t bytes) {
  look(address, bytes, Access::kWrite, false);
}

#define HOOKS_OF_SIZE(bytes)                                                                       \
  void __tsan_read##bytes(void* address) { look(address, bytes, Access::kRead, true); }            \
  void __tsan_write##bytes(void* address) { look(address, bytes, Access::kWrite, true); }          \
  void __tsan_unaligned_read##bytes(void* address) { look(address, bytes, Access::kRead, false); } \
  void __tsan_unaligned_write##bytes(void* address) { look(address, bytes, Access::kWrite, false); }
HOOKS_OF_SIZE(1)
HOOKS_OF_SIZE(2)
HOOKS_OF_SIZE(4)
HOOKS_OF_SIZE(8)
HOOKS_OF_SIZE(16)
#undef HOOKS_OF_SIZE

// Of the host's own code around the kernels (reference counts, tables), which one thread runs.
#define ATOMICS_OF_SIZE(bits, T)                                                                   \
  T __tsan_atomic##bits##_load(const volatile T* a, int) { return *a; }                            \
  void __tsan_atomic##bits##_store(volatile T* a, T v, int) { *a = v; }                            \
  T __tsan_atomic##bits##_exchange(volatile T* a, T v, int) {                                      \
    const T before = *a;                                                                           \
    *a = v;                                                                                        \
    return before;                                                                                 \
  }                                                                                                \
  T __tsan_atomic##bits##_fetch_add(volatile T* a, T v, int) {                                     \
    return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  T __tsan_atomic##bits##_fetch_sub(volatile T* a, T v, int) {                                     \
    return __atomic_fetch_sub(a, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  T __tsan_atomic##bits##_fetch_or(volatile T* a, T v, int) {                                      \
    return __atomic_fetch_or(a, v, __ATOMIC_SEQ_CST);                                              \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* a, T* expected, T v, int, int) {   \
    return __atomic_compare_exchange_n(a, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* a, T* expected, T v, int, int) {     \
    return __atomic_compare_exchange_n(a, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
ATOMICS_OF_SIZE(8, uint8_t)
ATOMICS_OF_SIZE(16, uint16_t)
ATOMICS_OF_SIZE(32, uint32_t)
ATOMICS_OF_SIZE(64, uint64_t)
#undef ATOMICS_OF_SIZE
void __tsan_atomic_thread_fence(int) {}
}
