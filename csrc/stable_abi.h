// torch's stable ABI, at the oldest version that has what is used here: an extension built against
// one torch from 2.10 on loads in every later one. https://pytorch.org/cppdocs/stable.html
#pragma once

#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
