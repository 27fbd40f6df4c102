// The op prefetch_pages_ on the CPU: the system reads mapped files ahead of the step.
#include <torch/csrc/stable/library.h>

#include "op/boxed.h"
#include "op/checks.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace torchao8 {
namespace {

constexpr const char* kOp = "prefetch_pages_";
constexpr size_t kRun = 4096;  // pages at a time

#if defined(__unix__) || defined(__APPLE__)
// Whether all of it is in memory: asking costs little next to the advice, which also looks at each
// page.
bool is_resident(void* begin, size_t bytes, size_t page) {
#if defined(__linux__)
  std::vector<unsigned char> pages((bytes + page - 1) / page);
  if (mincore(begin, bytes, pages.data()) != 0) return false;
  return std::all_of(pages.begin(), pages.end(), [](unsigned char p) { return p & 1; });
#else
  return false;
#endif
}
#endif

// Advice, which may be ignored: so are its errors. It begins at the border of a page.
void read_ahead(const TensorView& t) {
#if defined(__unix__) || defined(__APPLE__)
  static const auto page = size_t(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t end = first + size_t(t.numel()) * t.element_size();
  for (uintptr_t begin = first / page * page; begin < end; begin += kRun * page) {
    const size_t bytes = std::min<size_t>(end - begin, kRun * page);
    void* const run = reinterpret_cast<void*>(begin);
    if (!is_resident(run, bytes, page)) posix_madvise(run, bytes, POSIX_MADV_WILLNEED);
  }
#endif
}

void prefetch_pages_cpu(const TensorList& pages, const Tensor&) {
  for (size_t i = 0; i < pages.size(); i++) {
    const Argument a = {kOp, "pages", int64_t(i)};
    check_device(a, pages[i], kCpu);
    check_contiguous(a, pages[i]);
  }
  for (const TensorView& t : pages) read_ahead(t);
}

}  // namespace
}  // namespace torchao8

STABLE_TORCH_LIBRARY_IMPL(torchao8, CPU, m) {
  m.impl("prefetch_pages_", torchao8::boxed<torchao8::prefetch_pages_cpu>);
}
