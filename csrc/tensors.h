// A torch tensor as the bindings read it: through DLPack's table of C functions, at a tenth of the cost of asking for
// pointer, shape and strides in Python, and without libtorch. Where torch has no such table its attributes are read.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "onepass/dtype.h"

namespace onepass::bindings {

namespace py = pybind11;

// The part of DLPack 1's binary interface that is used here.
namespace dlpack {

struct Version {
  uint32_t major, minor;
};
struct Array {
  void* data;
  int32_t device_type, device;
  int32_t dims;
  uint8_t kind, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Managed {
  Version version;
  void* context;
  void (*release)(Managed*);
  uint64_t flags;
  Array array;
};
using SetError = void (*)(void*, const char*, const char*);
struct Functions {
  Version version;
  const Functions* older;
  int (*allocate)(Array* like, Managed** out, void* context, SetError);
  int (*export_owned)(void* object, Managed** out);
  int (*import_owned)(Managed*, void** out);
  int (*view)(void* object, Array* out);
  int (*current_stream)(int32_t device_type, int32_t device, void** out);
};
enum Kind : uint8_t { INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4, BOOL = 6, E4M3FN = 10 };
constexpr int32_t CPU = 1;

}  // namespace dlpack

// What of torch is asked; set when the module is loaded.
struct Torch {
  const dlpack::Functions* functions = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr, *dtype = nullptr, *device = nullptr;

  static Torch& get() {
    static Torch one;
    return one;
  }

  // Without the table (`fast` false) tensors are read by their attributes.
  void load(bool fast) {
    const auto torch = py::module_::import("torch");
    const py::object type = torch.attr("Tensor");
    tensor = reinterpret_cast<PyTypeObject*>(type.ptr());
    parameter = reinterpret_cast<PyTypeObject*>(torch.attr("nn").attr("Parameter").ptr());
    dtype = reinterpret_cast<PyTypeObject*>(torch.attr("dtype").ptr());
    device = reinterpret_cast<PyTypeObject*>(torch.attr("device").ptr());
    functions = nullptr;
    if (!fast || !py::hasattr(type, "__dlpack_c_exchange_api__")) return;
    const py::object table = type.attr("__dlpack_c_exchange_api__");
    auto* found = static_cast<const dlpack::Functions*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
    if (!found) throw py::error_already_set();
    while (found && found->version.major != 1) found = found->older;
    if (found && found->view) functions = found;
  }
};

// A tensor, or where Python passes None nothing (false). Valid while the Python object lives.
class Array {
 public:
  Array() = default;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  explicit operator bool() const { return object_ != nullptr; }
  int dims() const { return seen_.dims; }
  // Of a dim, counted from the end where negative.
  int64_t size(int dim) const { return seen_.shape[dim < 0 ? dim + seen_.dims : dim]; }
  int64_t stride(int dim) const { return seen_.strides[dim < 0 ? dim + seen_.dims : dim]; }
  const dlpack::Array& raw() const { return seen_; }
  py::handle object() const { return object_; }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(static_cast<char*>(seen_.data) + seen_.byte_offset);
  }

  bool on_host() const { return seen_.device_type == dlpack::CPU; }

  bool empty() const {
    for (int dim = 0; dim < dims(); ++dim)
      if (size(dim) == 0) return true;
    return false;
  }

  bool contiguous() const { return contiguous_from(0); }
  // Whether the elements of each row of dim 0 lie in one piece: a chunk of a larger tensor has such rows.
  bool in_rows() const { return contiguous_from(1); }

  bool is_bool() const { return seen_.kind == dlpack::BOOL; }

  DType dtype() const {
    if (seen_.kind == dlpack::BFLOAT) return DType::bf16;
    if (seen_.kind == dlpack::FLOAT && seen_.bits == 32) return DType::f32;
    if (seen_.kind == dlpack::FLOAT && seen_.bits == 16) return DType::f16;
    throw py::type_error("no kernel takes this dtype");
  }

  // False where the object is neither None nor a tensor; throws what torch raises of a tensor that is not strided.
  bool read(PyObject* object) {
    if (object == Py_None) return true;
    const Torch& torch = Torch::get();
    if (!PyObject_TypeCheck(object, torch.tensor)) return false;
    object_ = object;
    if (!torch.functions)
      read_attributes();
    else if (torch.functions->view(object, &seen_))
      throw py::error_already_set();
    return true;
  }

 private:
  bool contiguous_from(int first) const {
    int64_t step = 1;
    for (int dim = dims() - 1; dim >= first; --dim) {
      if (size(dim) != 1 && stride(dim) != step) return empty();
      step *= size(dim);
    }
    return true;
  }

  void read_attributes() {
    const py::handle x(object_);
    const auto shape = py::tuple(x.attr("shape")), strides = py::tuple(x.attr("stride")());
    const py::object dtype = x.attr("dtype"), device = x.attr("device");
    const bool floating = dtype.attr("is_floating_point").cast<bool>();
    const auto name = py::str(dtype).cast<std::string>();
    for (const auto& size : shape) held_.push_back(size.cast<int64_t>());
    for (const auto& stride : strides) held_.push_back(stride.cast<int64_t>());
    const py::object index = device.attr("index");
    seen_ = {reinterpret_cast<void*>(x.attr("data_ptr")().cast<uintptr_t>()),
             device.attr("type").cast<std::string>() == "cpu" ? dlpack::CPU : 0,
             index.is_none() ? 0 : index.cast<int32_t>(),
             static_cast<int32_t>(shape.size()),
             name == "torch.bool"            ? dlpack::BOOL
             : name == "torch.uint8"         ? dlpack::UINT
             : name == "torch.bfloat16"      ? dlpack::BFLOAT
             : name == "torch.float8_e4m3fn" ? dlpack::E4M3FN
             : floating                      ? dlpack::FLOAT
                                             : dlpack::INT,
             static_cast<uint8_t>(8 * dtype.attr("itemsize").cast<int>()),
             1,
             held_.data(),
             held_.data() + shape.size(),
             0};
  }

  dlpack::Array seen_{};
  PyObject* object_ = nullptr;
  std::vector<int64_t> held_;
};

// Memory for one call from torch's own allocator, on the device of a tensor.
class Scratch {
 public:
  Scratch(int64_t bytes, const Array& beside) {
    if (!bytes) return;
    const Torch& torch = Torch::get();
    if (torch.functions) {
      dlpack::Array like{};
      like.device_type = beside.raw().device_type;
      like.device = beside.raw().device;
      like.dims = 1;
      like.kind = dlpack::UINT;
      like.bits = 8;
      like.lanes = 1;
      like.shape = &bytes;
      if (torch.functions->allocate(&like, &managed_, nullptr, set_error)) throw py::error_already_set();
      data_ = static_cast<char*>(managed_->array.data) + managed_->array.byte_offset;
    } else {
      const py::object uint8 = py::module_::import("torch").attr("uint8");
      tensor_ = beside.object().attr("new_empty")(bytes, py::arg("dtype") = uint8);
      data_ = reinterpret_cast<void*>(tensor_.attr("data_ptr")().cast<uintptr_t>());
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (managed_ && managed_->release) managed_->release(managed_);
  }
  void* data() const { return data_; }

 private:
  static void set_error(void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); }

  dlpack::Managed* managed_ = nullptr;
  py::object tensor_;
  void* data_ = nullptr;
};

// What a call's checks and its choice of a backend may depend on, as bytes: of tensors dtype, device, shape, strides
// and, where gradients are on, whether one is required; of plain Python values, dtypes and devices all. `add` is false
// where that does not say it all: a tensor that is no plain one, any other object.
class Signature {
 public:
  explicit Signature(bool gradients) : gradients_(gradients) {}

  bool add(PyObject* x) {
    if (x == Py_None) return put('-');
    if (x == Py_True || x == Py_False) return put(x == Py_True ? 't' : 'f');
    if (Py_TYPE(x) == Torch::get().tensor || Py_TYPE(x) == Torch::get().parameter) return tensor(x);
    if (PyFloat_CheckExact(x)) return put('d') && put(PyFloat_AS_DOUBLE(x));
    if (PyLong_CheckExact(x)) {
      int overflow = 0;
      const long long value = PyLong_AsLongLongAndOverflow(x, &overflow);
      return !overflow && put('i') && put(value);
    }
    if (PyUnicode_CheckExact(x)) {
      Py_ssize_t length = 0;
      const char* text = PyUnicode_AsUTF8AndSize(x, &length);
      return text && put('s') && put(length) && append(text, static_cast<size_t>(length));
    }
    const Torch& torch = Torch::get();
    if (Py_TYPE(x) == torch.dtype) return put('y') && put(x);                  // there is one object of each
    if (Py_TYPE(x) == torch.device) return put('p') && put(PyObject_Hash(x));  // which says type and index
    if (!PyTuple_CheckExact(x)) return false;
    const Py_ssize_t count = PyTuple_GET_SIZE(x);
    if (!(put('(') && put(count))) return false;
    for (Py_ssize_t i = 0; i < count; ++i)
      if (!add(PyTuple_GET_ITEM(x, i))) return false;
    return true;
  }

  PyObject* bytes() const { return PyBytes_FromStringAndSize(text_.data(), static_cast<Py_ssize_t>(used_)); }

 private:
  bool tensor(PyObject* x) {
    if (gradients_) {
      static PyObject* name = PyUnicode_InternFromString("requires_grad");
      PyObject* required = PyObject_GetAttr(x, name);
      Py_XDECREF(required);
      if (!required || (required == Py_True && !put('G'))) return false;
    }
    Array a;
    a.read(x);
    const dlpack::Array& seen = a.raw();
    const size_t bytes = sizeof(int64_t) * static_cast<size_t>(seen.dims);
    return put('T') && put(seen.kind) && put(seen.bits) && put(seen.device_type) && put(seen.device) &&
           put(seen.dims) && append(seen.shape, bytes) && append(seen.strides, bytes);
  }

  template <class T>
  bool put(T value) {
    return append(&value, sizeof value);
  }

  bool append(const void* from, size_t bytes) {
    if (used_ + bytes > text_.size()) return false;
    if (bytes) std::memcpy(text_.data() + used_, from, bytes);
    used_ += bytes;
    return true;
  }

  std::array<char, 2048> text_;
  size_t used_ = 0;
  bool gradients_;
};

// signature(gradients, *arguments) -> bytes | None
inline PyObject* signature(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count < 1) return PyErr_SetString(PyExc_TypeError, "signature() takes whether gradients are on"), nullptr;
  Signature s(arguments[0] == Py_True);
  try {
    for (Py_ssize_t i = 1; i < count; ++i)
      if (!s.add(arguments[i])) {
        PyErr_Clear();
        Py_RETURN_NONE;
      }
  } catch (const py::error_already_set&) {  // a sparse tensor, or one on a device that DLPack does not know
    Py_RETURN_NONE;
  }
  return s.bytes();
}

}  // namespace onepass::bindings

namespace pybind11::detail {

template <>
struct type_caster<onepass::bindings::Array> {
  PYBIND11_TYPE_CASTER(onepass::bindings::Array, const_name("torch.Tensor | None"));
  bool load(handle source, bool) { return value.read(source.ptr()); }
};

}  // namespace pybind11::detail
