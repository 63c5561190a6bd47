// What XLA hands to a kernel and takes from it: arrays, all of one dtype but for a few that the kernel knows.
#pragma once

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace lcx {

struct Call {
  xla::ffi::ThreadPool& pool;
  xla::ffi::RemainingArgs& arguments;
  xla::ffi::RemainingRets& results;

  template <typename T>
  T* from(size_t argument) const {
    return arguments.get<xla::ffi::AnyBuffer>(argument)->template reinterpret_data<T>();
  }
  template <typename T>
  T* to(size_t result) const {
    return (*results.get<xla::ffi::AnyBuffer>(result))->template reinterpret_data<T>();
  }
  auto dimensions(size_t argument) const { return arguments.get<xla::ffi::AnyBuffer>(argument)->dimensions(); }

  // kernel(T()), with the T that the first argument is of: float or double.
  template <typename Kernel>
  xla::ffi::Error by_dtype(const Kernel& kernel) const {
    arguments.get<xla::ffi::AnyBuffer>(0)->element_type() == xla::ffi::F64 ? kernel(double()) : kernel(float());
    return xla::ffi::Error::Success();
  }
};

// How a handler (ThreadPool, RemainingArgs, RemainingRets, attributes...) is called; its attributes are to be added.
inline auto binding() { return xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets(); }

}  // namespace lcx
