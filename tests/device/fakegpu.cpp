// A stand-in for a GPU: a PrivateUse1 device whose memory is the host's.
//
// Every operation runs on the CPU's own kernels, on aliases of its tensors, so that results equal the CPU's. What a real
// device adds is kept: operations over tensors of two devices are refused as CUDA refuses them, backward passes run in a
// thread of the device, every operation counts as a launch, and what lets the host wait for the device, or copies to it,
// is reported to Python, which notes the call site.
//
// Not modelled: which attention kernel runs, streams, time, kernels that lack a dtype, NCCL, Triton.
//
// Python's headers and ATen's own are enough; pybind11 and torch/extension.h would triple the time of the build.
#include <Python.h>

#include <torch/library.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/SDPBackend.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_safe_softmax.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

using at::Tensor;
using c10::IValue;
using c10::IntArrayRef;
using c10::SymIntArrayRef;
using Names = std::unordered_set<std::string>;

// Declared here because ATen/autocast_mode.h takes longer to compile than all of this file.
namespace at::autocast {
TORCH_API ScalarType get_autocast_dtype(DeviceType device_type);
TORCH_API Tensor cached_cast(ScalarType to_type, const Tensor& tensor, DeviceType device_type);
}  // namespace at::autocast

namespace {

constexpr auto DEVICE_TYPE = c10::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet DEVICE_KEY(c10::DispatchKey::PrivateUse1);
const c10::Device DEVICE(DEVICE_TYPE, 0);

bool on_device(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == DEVICE_TYPE; }

// -- what is counted --------------------------------------------------------------------------------------------------

PyObject* listener = nullptr;  // called with the kind and the name of what lets the host wait, or copies to the device
std::atomic<int64_t> launch_count{0}, live_bytes{0}, peak_bytes{0};
std::mutex names_mutex;
std::unordered_map<std::string, int64_t> launches_by_name;
thread_local bool is_inside = false;  // a CPU kernel runs for an operation of the device; what it calls is no event

struct Inside {
  const bool outer = is_inside;
  Inside() { is_inside = true; }
  ~Inside() { is_inside = outer; }
};

void report(const char* kind, const std::string& name) {
  if (listener == nullptr || is_inside) return;
  PyGILState_STATE state = PyGILState_Ensure();
  PyObject* result = PyObject_CallFunction(listener, "ss", kind, name.c_str());
  if (result == nullptr) PyErr_Print();
  Py_XDECREF(result);
  PyGILState_Release(state);
}

void count_launch(const std::string& name) {
  if (is_inside) return;
  ++launch_count;
  std::lock_guard<std::mutex> lock(names_mutex);
  ++launches_by_name[name];
}

// -- memory, streams, random numbers ----------------------------------------------------------------------------------

struct Memory {
  void* address;
  size_t size;
};

void release(void* context) {
  auto* memory = static_cast<Memory*>(context);
  live_bytes -= memory->size;
  free(memory->address);
  delete memory;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* address = nullptr;
    if (size > 0 && posix_memalign(&address, 64, size) != 0) throw std::bad_alloc();
    // What reads memory before it is written shall show it, as it would on a GPU.
    if (size > 0) std::memset(address, 0xAB, std::min<size_t>(size, 4096));
    const int64_t live = (live_bytes += size);
    for (int64_t peak = peak_bytes; live > peak && !peak_bytes.compare_exchange_weak(peak, live);) {
    }
    return {address, new Memory{address, size}, &release, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
Allocator allocator;
REGISTER_ALLOCATOR(DEVICE_TYPE, &allocator);

// There is one device with one stream, on which everything is done at once; only the host's waits are worth a note.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = DEVICE_TYPE;
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::DeviceType type() const override { return DEVICE_TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  bool isStreamCapturing(const c10::Stream&) const override { return false; }
  void synchronizeStream(const c10::Stream&) const override { report("wait", "synchronize stream"); }
  void synchronizeEvent(void*) const override { report("wait", "synchronize event"); }
  void synchronizeDevice(c10::DeviceIndex) const override { report("wait", "synchronize device"); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct DeviceGenerator final : at::CPUGeneratorImpl {
  DeviceGenerator() : at::CPUGeneratorImpl(1234) {
    device_ = DEVICE;
    key_set_ = DEVICE_KEY;
  }
};

at::Generator& default_generator() {
  static at::Generator generator = at::make_generator<DeviceGenerator>();
  return generator;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<DeviceGenerator>(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto memory = allocator.allocate(size);
    if (storage.data() != nullptr) std::memcpy(memory.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

// -- tensors of the device, seen by the CPU ---------------------------------------------------------------------------

// A CPU tensor over the same memory. It does not own the memory, so it must not outlive `tensor`.
Tensor cpu_alias(const Tensor& tensor) {
  if (!on_device(tensor)) return tensor;
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), tensor.storage().nbytes(),
      c10::DataPtr(const_cast<void*>(tensor.storage().data()), c10::Device(c10::kCPU)), c10::GetCPUAllocator(),
      /*resizable=*/true);
  auto impl = c10::make_intrusive<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  impl->set_storage_offset(tensor.storage_offset());
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  Tensor alias(std::move(impl));
  if (tensor.is_neg()) alias._set_neg(true);
  return alias;
}

Tensor empty_on_device(IntArrayRef sizes, IntArrayRef strides, at::ScalarType dtype) {
  return at::detail::empty_strided_generic(sizes, strides, &allocator, DEVICE_KEY, dtype);
}

Tensor copy_to_device(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cpu()) return tensor;
  Tensor copy = empty_on_device(tensor.sizes(), tensor.strides(), tensor.scalar_type());
  cpu_alias(copy).copy_(tensor);
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) copy.unsafeGetTensorImpl()->set_wrapped_number(true);
  return copy;
}

// Lets a tensor show what another one shows.
void show(const Tensor& tensor, const c10::Storage& storage, int64_t offset, IntArrayRef sizes, IntArrayRef strides) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(storage);
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(sizes, strides);
}

// -- what CUDA refuses, and what it waits for -------------------------------------------------------------------------

const Names WAITING = {
    "aten::nonzero", "aten::nonzero.out", "aten::nonzero_numpy", "aten::masked_select", "aten::masked_select.out",
    "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive",
    "aten::equal", "aten::bincount", "aten::is_nonzero"};
// Pointwise operations take CPU tensors without dimensions; these do not.
const Names NO_CPU_SCALARS = {
    "aten::cat", "aten::cat.out", "aten::stack", "aten::index_select", "aten::index_select.out", "aten::gather",
    "aten::gather.out", "aten::scatter.src_out", "aten::scatter.value_out", "aten::index_add.out",
    "aten::index_copy.out", "aten::embedding", "aten::mm.out", "aten::bmm.out", "aten::addmm.out", "aten::linear",
    "aten::native_layer_norm", "aten::searchsorted.Tensor", "aten::masked_scatter_", "aten::isin.Tensor_Tensor_out"};
const Names CPU_INDICES = {
    "aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_",
    "aten::_unsafe_index.Tensor", "aten::_unsafe_index_put"};
const Names NO_INTEGERS = {
    "aten::mm.out", "aten::bmm.out", "aten::addmm.out", "aten::baddbmm.out", "aten::addmv.out", "aten::dot", "aten::mv"};

struct Call {
  const c10::FunctionSchema& schema;
  const std::string name;
  torch::jit::Stack* stack;
  const size_t base;  // of the arguments in the stack
  bool touches_device = false;

  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : schema(op.schema()),
        name(toString(op.schema().operator_name())),
        stack(stack),
        base(stack->size() - op.schema().arguments().size()) {}

  IValue& argument(size_t index) const { return (*stack)[base + index]; }

  // Calls `visit(tensor, index of the argument, whether it is one of a list)` with every tensor that is defined.
  template <typename Visit>
  void each_tensor(const Visit& visit) const {
    for (size_t index = 0; index < schema.arguments().size(); ++index) {
      const IValue& value = argument(index);
      if (value.isTensor() && value.toTensor().defined()) visit(value.toTensor(), index, false);
      if (value.isTensorList()) {
        for (const Tensor& tensor : value.toTensorVector()) visit(tensor, index, true);
      }
      if (value.isOptionalTensorList()) {
        for (const auto& tensor : value.toOptionalTensorVector()) {
          if (tensor && tensor->defined()) visit(*tensor, index, true);
        }
      }
    }
  }

  void check_devices() {
    std::string stranger;
    bool copies_indices = false;
    each_tensor([&](const Tensor& tensor, size_t index, bool in_list) {
      touches_device |= on_device(tensor);
      const bool is_number = tensor.unsafeGetTensorImpl()->is_wrapped_number();
      if (!tensor.is_cpu() || is_number || (tensor.dim() == 0 && !NO_CPU_SCALARS.count(name))) return;
      if (in_list && CPU_INDICES.count(name)) {
        copies_indices = true;
      } else {
        stranger = schema.arguments()[index].name();
      }
    });
    TORCH_CHECK(
        !touches_device || stranger.empty(), "Expected all tensors to be on the same device, but found at least two ",
        "devices, fakegpu:0 and cpu! (when checking argument ", stranger, " of ", name, ")");
    if (copies_indices) report("copy", name + " copies indices");
  }

  void check_kinds() const {
    for (size_t index = 0; index < schema.arguments().size(); ++index) {
      const IValue& value = argument(index);
      TORCH_CHECK(
          !value.isGenerator() || !value.toGenerator().defined() || value.toGenerator().device() == DEVICE,
          "Expected a 'fakegpu' device type for generator but found 'cpu' in ", name);
    }
    if (NO_INTEGERS.count(name)) {
      const auto dtype = argument(0).toTensor().scalar_type();
      TORCH_CHECK(
          at::isFloatingType(dtype) || at::isComplexType(dtype), "\"", name, "\" not implemented for '", dtype, "'");
    }
  }

  bool waits() const {
    if (WAITING.count(name)) return true;
    // The sum of the repeats is the size of the result.
    if (name == "aten::repeat_interleave.Tensor") return argument(1).isNone();
    if (name == "aten::isin.Tensor_Tensor_out" || name == "aten::isin.Tensor_Tensor") {
      // CUDA looks for many values by sorting, which begins with `unique`; the border is that of ATen.
      const auto elements = argument(0).toTensor().numel(), values = argument(1).toTensor().numel();
      return values >= static_cast<int64_t>(10.0 * std::pow(static_cast<double>(elements), 0.145));
    }
    if (name == "aten::_index_put_impl_" || name == "aten::index_put_") return waits_for_mask();
    return false;
  }

  // A mask becomes indices by `nonzero`; a single mask and a single value become `masked_fill`.
  bool waits_for_mask() const {
    int indices = 0;
    bool has_mask = false;
    for (const auto& index : argument(1).toOptionalTensorVector()) {
      if (!index || !index->defined()) continue;
      ++indices;
      has_mask |= index->scalar_type() == at::kBool || index->scalar_type() == at::kByte;
    }
    const bool accumulates = argument(3).toBool();
    return has_mask && !(indices == 1 && argument(2).toTensor().numel() == 1 && !accumulates);
  }
};

// -- every operation --------------------------------------------------------------------------------------------------

struct Alias {
  Tensor tensor, alias;
  bool is_written;
};

// Replaces what is on the device in the arguments by what the CPU understands.
std::vector<Alias> take_to_cpu(const Call& call) {
  std::vector<Alias> aliases;
  for (size_t index = 0; index < call.schema.arguments().size(); ++index) {
    IValue& value = call.argument(index);
    const auto* written = call.schema.arguments()[index].alias_info();
    auto aliased = [&](const Tensor& tensor) {
      Tensor alias = cpu_alias(tensor);
      if (on_device(tensor)) aliases.push_back({tensor, alias, written != nullptr && written->isWrite()});
      return alias;
    };
    if (value.isTensor()) {
      value = aliased(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(aliased(tensor));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor ? std::optional<Tensor>(aliased(*tensor)) : std::nullopt);
      }
      value = list;
    } else if (value.isDevice() && value.toDevice() == DEVICE) {
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator() && value.toGenerator().defined()) {
      value = IValue();  // the CPU's own generator draws
    }
  }
  return aliases;
}

// What a CPU kernel has returned, on the device again: the tensor that it was given, a view of it, or a new one.
Tensor back_to_device(const Tensor& result, const std::vector<Alias>& aliases) {
  if (!result.defined() || !result.is_cpu()) return result;
  for (const auto& [tensor, alias, _] : aliases) {
    if (alias.is_same(result)) return tensor;
  }
  for (const auto& [tensor, alias, _] : aliases) {
    if (result.numel() > 0 && alias.is_alias_of(result)) {
      Tensor view = empty_on_device({0}, {1}, result.scalar_type());
      show(view, tensor.storage(), result.storage_offset(), result.sizes(), result.strides());
      return view;
    }
  }
  return copy_to_device(result);
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call(op, stack);
  count_launch(call.name);
  call.check_devices();
  call.check_kinds();
  if (call.waits()) report("wait", call.name);
  bool makes_tensors = call.touches_device;
  for (size_t index = 0; index < call.schema.arguments().size(); ++index) {
    makes_tensors |= call.argument(index).isDevice() && call.argument(index).toDevice() == DEVICE;
  }
  const auto aliases = take_to_cpu(call);
  {
    Inside inside;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  for (const auto& [tensor, alias, is_written] : aliases) {  // of which the kernel may have resized some
    const bool is_same = alias.storage().data() == tensor.storage().data() && alias.sizes() == tensor.sizes() &&
                         alias.strides() == tensor.strides();
    if (is_written && !is_same) {
      Tensor copy = copy_to_device(alias);
      show(tensor, copy.storage(), 0, copy.sizes(), copy.strides());
    }
  }
  if (!makes_tensors) return;
  for (size_t index = stack->size() - call.schema.returns().size(); index < stack->size(); ++index) {
    IValue& value = (*stack)[index];
    if (value.isTensor()) value = back_to_device(value.toTensor(), aliases);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(back_to_device(tensor, aliases));
      value = list;
    }
  }
}

// -- what the device does itself --------------------------------------------------------------------------------------

Tensor empty(
    SymIntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(sizes), &allocator, DEVICE_KEY, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    SymIntArrayRef sizes, SymIntArrayRef strides, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return empty_on_device(
      C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), c10::dtype_or_default(dtype));
}

Tensor as_strided(
    const Tensor& tensor, SymIntArrayRef sizes, SymIntArrayRef strides, std::optional<c10::SymInt> offset) {
  const auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(
      tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), start);
}

Tensor view(const Tensor& tensor, SymIntArrayRef sizes) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(sizes));
}

Tensor reshape_alias(const Tensor& tensor, SymIntArrayRef sizes, SymIntArrayRef strides) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

const Tensor& resize(const Tensor& tensor, SymIntArrayRef sizes, std::optional<at::MemoryFormat>) {
  const auto wanted = C10_AS_INTARRAYREF_SLOW(sizes);
  const size_t size = (c10::multiply_integers(wanted) + tensor.storage_offset()) * tensor.itemsize();
  if (size > tensor.storage().nbytes()) Hooks().resizePrivateUse1Bytes(tensor.storage(), size);
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(wanted);
  return tensor;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (on_device(from) && on_device(to)) {
    count_launch("aten::copy_");
  } else if (on_device(to)) {
    report("copy", "copy to the device");
  } else if (!non_blocking) {
    report("wait", "copy to the host");
  }
  Inside inside;
  cpu_alias(to).copy_(cpu_alias(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

c10::Scalar local_scalar_dense(const Tensor& tensor) {
  report("wait", "a number");
  Inside inside;
  return at::_local_scalar_dense(cpu_alias(tensor));
}

Tensor& set_storage(
    Tensor& tensor, c10::Storage storage, c10::SymInt offset, SymIntArrayRef sizes, SymIntArrayRef strides) {
  const auto wanted = C10_AS_INTARRAYREF_SLOW(sizes);
  if (strides.size() == sizes.size()) {
    show(tensor, storage, offset.expect_int(), wanted, C10_AS_INTARRAYREF_SLOW(strides));
  } else {
    show(tensor, storage, offset.expect_int(), {0}, {1});
    tensor.unsafeGetTensorImpl()->set_sizes_contiguous(wanted);
  }
  return tensor;
}

Tensor& set_whole_storage(Tensor& tensor, c10::Storage storage) {
  show(tensor, storage, 0, {static_cast<int64_t>(storage.nbytes() / tensor.itemsize())}, {1});
  return tensor;
}

Tensor& set_tensor(Tensor& tensor, const Tensor& source) {
  show(tensor, source.storage(), source.storage_offset(), source.sizes(), source.strides());
  return tensor;
}

void record_stream(Tensor&, c10::Stream) {}

// -- attention, one launch in each direction as on a GPU --------------------------------------------------------------

int64_t choose_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>,
    bool) {
  return static_cast<int64_t>(at::SDPBackend::overrideable);
}

using Attended = std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>;

Attended attend(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias, double dropout,
    bool is_causal, bool, std::optional<double> scale) {
  count_launch("attention");
  Inside inside;
  const auto mask = bias ? std::optional<Tensor>(cpu_alias(*bias)) : std::nullopt;
  const bool is_grouped = query.size(-3) != key.size(-3);
  Tensor output = at::scaled_dot_product_attention(
      cpu_alias(query), cpu_alias(key), cpu_alias(value), mask, dropout, is_causal, scale, is_grouped);
  const Tensor nothing = empty_on_device({0}, {1}, at::kFloat);
  return {copy_to_device(output), nothing, nothing, nothing, query.size(-2), key.size(-2), nothing, nothing, nothing};
}

// Sums up the gradients of the heads that share keys and values.
Tensor of_group(const Tensor& gradient, const Tensor& like) {
  const int64_t heads = like.size(-3);
  return gradient.unflatten(-3, {heads, gradient.size(-3) / heads}).sum(-3);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(
    const Tensor& output_gradient, const Tensor& device_query, const Tensor& device_key, const Tensor& device_value,
    const Tensor& device_bias, std::array<bool, 4>, const Tensor& device_output, const Tensor&, const Tensor&,
    const Tensor&, c10::SymInt, c10::SymInt, double dropout, bool is_causal, const Tensor&, const Tensor&,
    std::optional<double> given_scale) {
  TORCH_CHECK(dropout == 0.0 && !is_causal, "fakegpu differentiates attention without dropout and `is_causal`");
  count_launch("attention backward");
  Inside inside;
  const auto dtype = device_query.scalar_type();
  auto precise = [](const Tensor& tensor) { return cpu_alias(tensor).to(at::kFloat); };
  const Tensor query = precise(device_query), gradient = precise(output_gradient), output = precise(device_output);
  const int64_t group = query.size(-3) / device_key.size(-3);
  const Tensor key = precise(device_key).repeat_interleave(group, -3);
  const Tensor value = precise(device_value).repeat_interleave(group, -3);
  const double scale = given_scale.value_or(1.0 / std::sqrt(static_cast<double>(query.size(-1))));
  Tensor scores = query.matmul(key.transpose(-2, -1)).mul(scale);
  if (device_bias.defined()) scores = scores.add(precise(device_bias));
  const Tensor weights = at::_safe_softmax(scores, -1);
  const Tensor by_weight = gradient.matmul(value.transpose(-2, -1)).sub(gradient.mul(output).sum(-1, true));
  const Tensor by_score = weights.mul(by_weight).mul(scale);
  auto finished = [&](const Tensor& tensor) { return copy_to_device(tensor.to(dtype)); };
  return {
      finished(by_score.matmul(key)),
      finished(of_group(by_score.transpose(-2, -1).matmul(query), device_key)),
      finished(of_group(weights.transpose(-2, -1).matmul(gradient), device_value)), Tensor()};
}

// -- products of half precision into fp32, which a CPU does not have and CUDA does in one launch -----------------------

Tensor multiply_into(const Tensor& left, const Tensor& right, at::ScalarType dtype) {
  TORCH_CHECK(on_device(left) && on_device(right), "fakegpu multiplies its own tensors only");
  count_launch("aten::mm");
  Inside inside;
  return copy_to_device(cpu_alias(left).to(dtype).mm(cpu_alias(right).to(dtype)));
}

// -- autocast, as on CUDA ---------------------------------------------------------------------------------------------

// Those operations of ATen/autocast_mode.h that transformers' decoders and our code call.
const char* const IN_LOW_PRECISION[] = {"linear", "matmul", "mm",  "addmm",  "bmm", "baddbmm", "addbmm", "mv", "addmv",
                                        "einsum", "scaled_dot_product_attention"};
const char* const IN_FULL_PRECISION[] = {
    "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "pow.Tensor_Scalar", "pow.Tensor_Tensor",
    "softplus", "layer_norm", "native_layer_norm", "group_norm", "nll_loss", "kl_div", "mse_loss", "l1_loss",
    "logsumexp", "cosine_similarity", "binary_cross_entropy_with_logits", "dist", "cdist", "renorm"};
const char* const WITH_DTYPE[] = {"prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum",
                                  "linalg_vector_norm", "sum", "sum.dim_IntList"};

c10::impl::ExcludeDispatchKeyGuard without_autocast() {
  return c10::impl::ExcludeDispatchKeyGuard(c10::DispatchKey::AutocastPrivateUse1);
}

void cast_and_call(const c10::OperatorHandle& op, torch::jit::Stack* stack, at::ScalarType dtype) {
  auto guard = without_autocast();
  Call call(op, stack);
  for (size_t index = 0; index < call.schema.arguments().size(); ++index) {
    IValue& value = call.argument(index);
    if (value.isTensor()) value = at::autocast::cached_cast(dtype, value.toTensor(), DEVICE_TYPE);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) {
        list.push_back(at::autocast::cached_cast(dtype, tensor, DEVICE_TYPE));
      }
      value = list;
    }
  }
  op.callBoxed(stack);
}

void call_in_low_precision(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  cast_and_call(op, stack, at::autocast::get_autocast_dtype(DEVICE_TYPE));
}

void call_in_full_precision(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  cast_and_call(op, stack, at::kFloat);
}

void call_with_dtype(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto guard = without_autocast();
  Call call(op, stack);
  const auto given = call.argument(0).toTensor().scalar_type();
  const auto index = call.schema.argumentIndexWithName("dtype");
  if (index && call.argument(*index).isNone() && (given == at::kBFloat16 || given == at::kHalf)) {
    call.argument(*index) = at::kFloat;
  }
  op.callBoxed(stack);
}

// -- registration -----------------------------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

// Kernels for whole lists of tensors are single launches on CUDA; without these lines they would be taken apart.
const char* const OF_LISTS[] = {"_foreach_norm.Scalar", "_foreach_mul_.Tensor", "_foreach_mul_.Scalar"};

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", resize);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("record_stream", record_stream);
  m.impl("mm.dtype", multiply_into);
  m.impl("_scaled_dot_product_fused_attention_overrideable", attend);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", attend_backward);
  for (const char* name : OF_LISTS) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  for (const char* name : IN_LOW_PRECISION) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&call_in_low_precision>());
  }
  for (const char* name : IN_FULL_PRECISION) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&call_in_full_precision>());
  }
  for (const char* name : WITH_DTYPE) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&call_with_dtype>());
}


// -- for Python: torch.ops.fakegpu ------------------------------------------------------------------------------------

c10::Dict<std::string, int64_t> launches() {
  std::lock_guard<std::mutex> lock(names_mutex);
  c10::Dict<std::string, int64_t> result;
  for (const auto& [name, count] : launches_by_name) result.insert(name, count);
  return result;
}

Tensor generator_state() { return default_generator().get_state(); }
void seed_generator(int64_t seed) { default_generator().set_current_seed(seed); }
void set_generator_state(const Tensor& state) { default_generator().set_state(state); }

TORCH_LIBRARY(fakegpu, m) {
  m.def("launches() -> Dict(str, int)", &launches);
  m.def("launch_count() -> int", [] { return launch_count.load(); });
  m.def("live_bytes() -> int", [] { return live_bytes.load(); });
  m.def("peak_bytes() -> int", [] { return peak_bytes.load(); });
  m.def("reset_peak() -> ()", [] { peak_bytes = live_bytes.load(); });
  m.def("seed_generator(int seed) -> ()", &seed_generator);
  m.def("generator_state() -> Tensor", &generator_state);
  m.def("set_generator_state(Tensor state) -> ()", &set_generator_state);
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
}  // namespace at::native

// Called through ctypes with the function that hears of waits and copies.
extern "C" void fakegpu_start(PyObject* function) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  Py_XINCREF(function);
  listener = function;
}
