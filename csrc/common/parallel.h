// parallel_for: one parallel region over independent tasks.
//
// torch's own operators run on an OpenMP pool, and that pool's idle workers spin for milliseconds. A second pool
// would compete with them for the cores, so when the process already holds an OpenMP runtime (torch loads it with
// global visibility) its workers are used, through the stable entry points GOMP_parallel and omp_get_thread_num that
// both libgomp and libomp export. Without one, a pool of std::thread does the work.
#pragma once

#include <cstdint>
#include <type_traits>

namespace tdc {

using TaskFn = void (*)(void* context, int64_t task, int thread);

// Calls fn(context, task, thread) once for every task in [0, tasks), handed out in increasing order to at most
// `threads` threads; `thread` < threads identifies the caller within this region. Tasks must be independent.
// An exception thrown by a task is rethrown here once all threads are done.
void parallel_run(int64_t tasks, int threads, TaskFn fn, void* context);

template <typename Fn>
void parallel_for(int64_t tasks, int threads, Fn&& fn) {
  using Body = std::remove_reference_t<Fn>;
  parallel_run(
      tasks, threads, [](void* context, int64_t task, int thread) { (*static_cast<Body*>(context))(task, thread); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

// "openmp" when the process's OpenMP pool is used, "threads" otherwise.
const char* parallel_backend();

}  // namespace tdc
