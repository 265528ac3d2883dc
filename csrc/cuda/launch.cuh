// How a kernel of one parameter struct is launched. The tests' emulation puts its own launch here.
#pragma once

#ifndef LPIPS_FAST_LAUNCH
#define LPIPS_FAST_LAUNCH(kernel, blocks, threads, stream, tasks) \
  kernel<<<blocks, threads, 0, stream>>>(tasks)
#endif
