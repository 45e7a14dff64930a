// What follows cuda/device_sm90.cuh where hangs are looked for (hangs.py): a wait of two seconds says where it is and
// goes on, as do all that follow. So the kernel ends, with a wrong result.
namespace tdc {

__device__ int reported_hangs;

template <bool kCluster>
__device__ __noinline__ void reporting_wait(Mbarrier* barrier, unsigned parity, const char* name, const char* file,
                                            int line) {
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  for (unsigned done = 0;;) {
    if (kCluster) {
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(shared_window(barrier)), "r"(parity)
          : "memory");
    } else {
      asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                   : "=r"(done)
                   : "r"(shared_window(barrier)), "r"(parity)
                   : "memory");
    }
    if (done) return;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (now - begin > 2000000000ull || *static_cast<volatile int*>(&reported_hangs)) break;
  }
  if (threadIdx.x % 32 == 0 && atomicAdd(&reported_hangs, 1) < 64) {
    printf("%s:%d: block (%d, %d), thread %d waits for %s, parity %d\n", file, line, blockIdx.x, blockIdx.y,
           threadIdx.x, name, parity);
  }
}

}  // namespace tdc

#define mbarrier_wait(barrier, ...) reporting_wait<false>(barrier, __VA_ARGS__, #barrier, __FILE__, __LINE__)
#define mbarrier_wait_cluster(barrier, ...) reporting_wait<true>(barrier, __VA_ARGS__, #barrier, __FILE__, __LINE__)
