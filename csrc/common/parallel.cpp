#include "common/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include <dlfcn.h>

namespace tdc {
namespace {

struct Region {
  int64_t tasks;
  TaskFn fn;
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  // After an exception no more tasks are handed out; the first one is kept. It must not cross the OpenMP runtime.
  void work(int thread) noexcept {
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks || failed.load(std::memory_order_relaxed)) return;
      try {
        fn(context, task, thread);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
};

struct OpenMP {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Query = int (*)();
  Parallel parallel = nullptr;
  Query thread_num = nullptr;
  Query in_parallel = nullptr;

  bool found() const { return parallel && thread_num && in_parallel; }

  static OpenMP resolve() {
    OpenMP omp;
    omp.parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    omp.thread_num = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    omp.in_parallel = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_in_parallel"));
    return omp;
  }
};

// Resolved at the first parallel region, when the process has usually imported torch.
const OpenMP& openmp() {
  static const OpenMP omp = OpenMP::resolve();
  return omp;
}

// Workers wait on a condition variable. One region at a time: concurrent callers queue on `gate_`.
class ThreadPool {
 public:
  // Never destroyed: joining workers while the process exits can hang under a forked or unloading interpreter.
  static ThreadPool& instance() {
    static ThreadPool* pool = new ThreadPool;
    return *pool;
  }

  void run(Region& region, int threads) {
    std::lock_guard<std::mutex> gate(gate_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        const int id = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, id, seen = generation_]() mutable { loop(id, seen); });
        workers_.back().detach();
      }
      region_ = &region;
      wanted_ = threads;
      running_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    region.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    region_ = nullptr;
  }

 private:
  void loop(int id, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (id >= wanted_) continue;
      Region* region = region_;
      lock.unlock();
      region->work(id);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex gate_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Region* region_ = nullptr;
  uint64_t generation_ = 0;
  int wanted_ = 0, running_ = 0;
};

}  // namespace

void parallel_run(int64_t tasks, int threads, TaskFn fn, void* context) {
  Region region;
  region.tasks = tasks;
  region.fn = fn;
  region.context = context;
  const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
  const OpenMP& omp = openmp();
  if (team == 1 || (omp.found() && omp.in_parallel())) {
    region.work(0);
  } else if (omp.found()) {
    omp.parallel([](void* r) { static_cast<Region*>(r)->work(openmp().thread_num()); }, &region,
                 static_cast<unsigned>(team), 0);
  } else {
    ThreadPool::instance().run(region, team);
  }
  if (region.error) std::rethrow_exception(region.error);
}

const char* parallel_backend() { return openmp().found() ? "openmp" : "threads"; }

}  // namespace tdc
