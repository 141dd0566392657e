// The greedy choice on the device: the smallest index of each row's largest logit. A NaN is above everything, so that
// the host, which sees only the winner, learns of it. One block per row; the launch gives blocks of kThreads.
constexpr int kThreads = 512;

struct Best {
  float value;
  long long index;
};

__device__ bool above(const Best& a, const Best& b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.value != b.value) return a.value > b.value;
  return a.index < b.index;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    kimi_argmax(const float* logits, long long columns, long long* index, float* value) {
  const float* row = logits + blockIdx.x * columns;
  // a thread without a column must lose even against a row of -inf
  Best best{-__int_as_float(0x7f800000), columns};
  for (long long column = threadIdx.x; column < columns; column += kThreads) {
    const Best next{row[column], column};
    if (above(next, best)) best = next;
  }
  __shared__ Best bests[kThreads];
  bests[threadIdx.x] = best;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half && above(bests[threadIdx.x + half], bests[threadIdx.x])) {
      bests[threadIdx.x] = bests[threadIdx.x + half];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    index[blockIdx.x] = bests[0].index;
    value[blockIdx.x] = bests[0].value;
  }
}
