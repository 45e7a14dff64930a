// Python bindings of the launch planners (in every build) and of cuda_launch, which runs their launches (with nvcc). A
// planner takes the fields of its argument struct as keywords, addresses as integers (0 = absent), and `device`, the
// tuple (arch, multiprocessors, shared_limit).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/conv/few_launch.h"
#include "cuda/conv/hopper_launch.h"
#include "cuda/conv/launch.h"
#include "cuda/launch/families.h"
#include "cuda/group_norm/launch.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/tensor_maps.h"
#include "cuda/pack/launch.h"
#include "cuda/plan/launch.h"
#ifdef TDC_FAST_CUDA
#include "cuda/launch/registry.h"
#include "cuda/launch/runtime.h"
#endif

namespace py = pybind11;

namespace tdc {
namespace {

// Reads keyword arguments into a struct: each is taken once, and none may be left. Lookup bypasses Python's methods
// because some twenty arguments are read before every launch.
class Keywords {
 public:
  explicit Keywords(const py::kwargs& given) : given_(given) {}

  template <class T>
  void take(const char* name, T& field) {
    const py::handle value = find(name);
    if (!value) throw py::type_error(std::string("missing keyword argument '") + name + "'");
    taken_.push_back(name);
    if constexpr (std::is_pointer<T>::value)
      field = reinterpret_cast<T>(value.cast<uintptr_t>());
    else
      field = value.cast<T>();
  }

  template <class T>
  void take_if_given(const char* name, T& field) {
    if (find(name)) take(name, field);
  }

  Device take_device() {
    py::tuple device;
    take("device", device);
    if (device.size() != 3) throw py::type_error("device: expected (arch, multiprocessors, shared_limit)");
    return {device[0].cast<int>(), device[1].cast<int>(), device[2].cast<int>()};
  }

  void finish() const {
    if (taken_.size() == given_.size()) return;
    for (const auto& item : given_) {
      const std::string name = item.first.cast<std::string>();
      if (std::find(taken_.begin(), taken_.end(), name) == taken_.end())
        throw py::type_error("unknown keyword argument '" + name + "'");
    }
  }

 private:
  py::handle find(const char* name) const { return PyDict_GetItemString(given_.ptr(), name); }

  const py::kwargs& given_;
  std::vector<const char*> taken_;
};

#define TAKE(field) keywords.take(#field, arguments.field)
#define TAKE_IF_GIVEN(field) keywords.take_if_given(#field, arguments.field)

// def(name): calls function(arguments, device) with what `read` takes from the keywords.
template <class Arguments, class Read, class Function>
void define(py::module_& module, const char* name, const char* doc, Read read, Function function) {
  module.def(
      name,
      [read, function](const py::kwargs& given) {
        Keywords keywords(given);
        Arguments arguments{};
        read(keywords, arguments);
        const Device device = keywords.take_device();
        keywords.finish();
        return function(arguments, device);
      },
      doc);
}

void bind_launch(py::module_& module) {
  py::class_<Launch>(module, "Launch", "One kernel launch: everything that starts it, as plain data.")
      .def(py::init([](std::string kernel, const std::array<unsigned, 3>& grid, unsigned threads, unsigned shared_bytes,
                       const py::bytes& params, std::string shapes, std::vector<unsigned> tensor_maps) {
             const std::string bytes = params;
             return Launch{std::move(kernel),
                           {grid[0], grid[1], grid[2]},
                           threads,
                           shared_bytes,
                           std::vector<unsigned char>(bytes.begin(), bytes.end()),
                           std::move(shapes),
                           std::move(tensor_maps)};
           }),
           py::kw_only(), py::arg("kernel"), py::arg("grid"), py::arg("threads"), py::arg("shared_bytes"),
           py::arg("params"), py::arg("shapes"), py::arg("tensor_maps") = std::vector<unsigned>())
      .def_readonly("kernel", &Launch::kernel)
      .def_property_readonly("grid", [](const Launch& l) { return py::make_tuple(l.grid[0], l.grid[1], l.grid[2]); })
      .def_readonly("threads", &Launch::threads)
      .def_readonly("shared_bytes", &Launch::shared_bytes)
      .def_property_readonly(
          "params",
          [](const Launch& l) { return py::bytes(reinterpret_cast<const char*>(l.params.data()), l.params.size()); })
      .def_readonly("shapes", &Launch::shapes)
      .def_readonly("tensor_maps", &Launch::tensor_maps,
                    "Where the parameters have descriptions of tensor maps, which a GPU takes as the driver encodes "
                    "them: encoded_params().")
      .def("encoded_params",
           [](const Launch& l) {
             const std::vector<unsigned char> bytes = encoded_params(l);
             return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
           })
      .def("__repr__", [](const Launch& l) {
        return "Launch(" + l.kernel + ", grid=(" + std::to_string(l.grid[0]) + ", " + std::to_string(l.grid[1]) + ", " +
               std::to_string(l.grid[2]) + "), threads=" + std::to_string(l.threads) +
               ", shared_bytes=" + std::to_string(l.shared_bytes) + ", " + l.shapes + ")";
      });
}

void bind_planner_of_plans(py::module_& module) {
  const auto read = [](Keywords& keywords, PlanArguments& arguments) {
    TAKE(groups), TAKE(order), TAKE(inverse), TAKE(sorted_groups), TAKE(offsets), TAKE(tiles);
    TAKE(batch), TAKE(num_groups);
  };
  define<PlanArguments>(module, "cuda_launches_routing_plan", "Launches that make a routing plan and its tile table.",
                        read, launch_routing_plan);
  define<PlanArguments>(
      module, "cuda_routing_plan_supported", "Whether the kernel can count this many groups.",
      [](Keywords& keywords, PlanArguments& arguments) { TAKE(num_groups); },
      [](const PlanArguments& arguments, const Device& device) {
        return routing_plan_supported(arguments.num_groups, device);
      });
}

void take_convolution_sizes(Keywords& keywords, ConvArguments& arguments) {
  TAKE(dtype), TAKE(tf32), TAKE(batch);
  TAKE(height), TAKE(width), TAKE(in_channels), TAKE(out_channels), TAKE(filter_height), TAKE(filter_width);
  TAKE(stride_height), TAKE(stride_width), TAKE(pad_height), TAKE(pad_width), TAKE(num_groups), TAKE(num_experts);
  TAKE_IF_GIVEN(x2_channels), TAKE_IF_GIVEN(upsample), TAKE_IF_GIVEN(hopper);
}

void take_convolution(Keywords& keywords, ConvArguments& arguments) {
  TAKE(offsets), TAKE(weight_index), TAKE(in_widths), TAKE(out_widths), TAKE_IF_GIVEN(x2);
  take_convolution_sizes(keywords, arguments);
}

void bind_planners_of_convolutions(py::module_& module) {
  const auto forward = [](Keywords& keywords, ConvArguments& arguments) {
    TAKE(x), TAKE(weight), TAKE(bias), TAKE(sample_bias), TAKE(residual), TAKE(y), TAKE(tiles);
    TAKE_IF_GIVEN(workspace);
    take_convolution(keywords, arguments);
  };
  const auto dgrad = [](Keywords& keywords, ConvArguments& arguments) {
    TAKE(dy), TAKE(weight), TAKE(dx), TAKE(tiles), TAKE_IF_GIVEN(dx2), TAKE_IF_GIVEN(workspace);
    take_convolution(keywords, arguments);
  };
  const auto wgrad = [](Keywords& keywords, ConvArguments& arguments) {
    TAKE(x), TAKE(dy), TAKE(dweight), TAKE(dbias), TAKE(dsample_bias), TAKE(workspace);
    take_convolution(keywords, arguments);
  };
  define<ConvArguments>(module, "cuda_launches_conv_forward", "Launches of the routed convolution.", forward,
                        launch_conv_forward);
  define<ConvArguments>(module, "cuda_conv_forward_workspace", "Bytes of workspace that it needs.", forward,
                        conv_forward_workspace);
  define<ConvArguments>(module, "cuda_launches_conv_dgrad", "Launches of its dgrad.", dgrad, launch_conv_dgrad);
  define<ConvArguments>(module, "cuda_conv_dgrad_workspace", "Bytes of workspace that dgrad needs.", dgrad,
                        conv_dgrad_workspace);
  define<ConvArguments>(module, "cuda_launches_conv_wgrad", "Launches of its wgrad: dweight, dbias, dsample_bias.",
                        wgrad, launch_conv_wgrad);
  for (const bool is_forward : {false, true})
    define<ConvArguments>(
        module, is_forward ? "cuda_conv_forward_hopper_choices" : "cuda_conv_dgrad_hopper_choices",
        "[(tile, clocks by the model, columns that its products may have)] of the Hopper form's forward or dgrad, the "
        "chosen one first. Takes sizes only; raises ValueError where the form does not serve.",
        [](Keywords& keywords, ConvArguments& arguments) { take_convolution_sizes(keywords, arguments); },
        [is_forward](const ConvArguments& arguments, const Device& device) {
          std::vector<std::tuple<std::string, int64_t, std::array<int, 3>>> choices;
          for (const HopperChoice& choice : hopper_choices(arguments, device, is_forward))
            choices.emplace_back(choice.kernel, choice.clocks, choice.columns);
          return choices;
        });
  for (const bool is_forward : {false, true})
    define<ConvArguments>(
        module, is_forward ? "cuda_conv_forward_hopper_refusal" : "cuda_conv_dgrad_hopper_refusal",
        "Why the Hopper form does not serve a convolution or its dgrad, or ''. Takes sizes only.",
        [](Keywords& keywords, ConvArguments& arguments) { take_convolution_sizes(keywords, arguments); },
        [is_forward](const ConvArguments& arguments, const Device& device) {
          return hopper_refusal(arguments, device, is_forward);
        });
  define<ConvArguments>(
      module, "cuda_conv_wgrad_hopper_refusal", "The same of its wgrad.",
      [](Keywords& keywords, ConvArguments& arguments) { take_convolution_sizes(keywords, arguments); },
      hopper_wgrad_refusal);
  for (const auto& [direction, name] : {std::pair{ConvDirection::kForward, "cuda_conv_forward_few_refusal"},
                                        std::pair{ConvDirection::kDgrad, "cuda_conv_dgrad_few_refusal"},
                                        std::pair{ConvDirection::kWgrad, "cuda_conv_wgrad_few_refusal"}}) {
    define<ConvArguments>(
        module, name, "Why no kernel for few channels serves this direction of a convolution, or ''. Takes sizes only.",
        [](Keywords& keywords, ConvArguments& arguments) { take_convolution_sizes(keywords, arguments); },
        [direction = direction](const ConvArguments& arguments, const Device& device) {
          return few_refusal(arguments, device, direction);
        });
  }
  define<ConvArguments>(module, "cuda_conv_wgrad_workspace", "Bytes of workspace that wgrad needs.", wgrad,
                        conv_wgrad_workspace);
}

void take_norm(Keywords& keywords, NormArguments& arguments) {
  TAKE(x), TAKE(weight), TAKE(bias), TAKE(scale), TAKE(shift), TAKE(mean), TAKE(rstd), TAKE(offsets);
  TAKE(weight_index), TAKE(widths), TAKE(workspace);
  TAKE_IF_GIVEN(x2), TAKE_IF_GIVEN(counters), TAKE_IF_GIVEN(streamed), TAKE_IF_GIVEN(scale_stride),
      TAKE_IF_GIVEN(shift_stride);
}

void take_norm_sizes(Keywords& keywords, NormArguments& arguments) {
  TAKE(dtype), TAKE(batch), TAKE(height), TAKE(width), TAKE(channels), TAKE(num_norm_groups), TAKE(eps), TAKE(silu);
  TAKE(num_groups), TAKE(num_experts), TAKE_IF_GIVEN(x2_channels);
}

void bind_planners_of_norms(py::module_& module) {
  const auto forward = [](Keywords& keywords, NormArguments& arguments) {
    TAKE(y);
    take_norm(keywords, arguments), take_norm_sizes(keywords, arguments);
  };
  const auto backward = [](Keywords& keywords, NormBackwardArguments& arguments) {
    TAKE(dy), TAKE(dx), TAKE(dweight), TAKE(dbias), TAKE(dscale), TAKE(dshift), TAKE_IF_GIVEN(dx2);
    take_norm(keywords, arguments), take_norm_sizes(keywords, arguments);
  };
  define<NormArguments>(module, "cuda_launches_group_norm_forward", "Launches of the routed group norm.", forward,
                        launch_group_norm_forward);
  define<NormArguments>(module, "cuda_group_norm_forward_workspace", "Bytes of workspace that it needs.", forward,
                        group_norm_forward_workspace);
  define<NormBackwardArguments>(module, "cuda_launches_group_norm_backward", "Launches of its gradients.", backward,
                                launch_group_norm_backward);
  define<NormBackwardArguments>(module, "cuda_group_norm_backward_workspace", "Bytes of workspace that they need.",
                                backward, group_norm_backward_workspace);
  for (const bool gradients : {false, true}) {
    const std::string name = gradients ? "cuda_group_norm_backward" : "cuda_group_norm_forward";
    define<NormArguments>(module, (name + "_refusal").c_str(), "Why no kernel serves these sizes, or ''.",
                          take_norm_sizes, [gradients](const NormArguments& arguments, const Device& device) {
                            return group_norm_refusal(arguments, device, gradients);
                          });
    define<NormArguments>(module, (name + "_hopper_form").c_str(), "How they run as `streamed`, in words.",
                          take_norm_sizes, [gradients](const NormArguments& arguments, const Device& device) {
                            return group_norm_hopper_form(arguments, device, gradients);
                          });
  }
}

void bind_planner_of_packing(py::module_& module) {
  const auto read = [](Keywords& keywords, PackArguments& arguments) {
    TAKE(source), TAKE(target), TAKE(out_order), TAKE(in_order), TAKE(out_widths), TAKE(in_widths);
    TAKE(element_size), TAKE(num_experts), TAKE(out_channels), TAKE(in_channels), TAKE(taps);
    TAKE(source_out_channels), TAKE(source_in_channels);
    TAKE(source_expert_stride), TAKE(source_out_stride), TAKE(source_in_stride), TAKE(source_tap_stride);
    TAKE(target_expert_stride), TAKE(target_out_stride), TAKE(target_in_stride), TAKE(target_tap_stride);
  };
  define<PackArguments>(module, "cuda_launches_pack_experts", "Launches that permute and compact experts' channels.",
                        read, launch_pack_experts);
}

}  // namespace

void bind_cuda(py::module_& module) {
  // A build without nvcc has "" here and none of the functions that need a driver.
  module.attr("cuda_architectures") = TDC_FAST_CUDA_ARCHITECTURES;
  module.attr("cuda_kernels") = kernel_families();
  bind_launch(module);
  bind_planner_of_plans(module);
  bind_planners_of_convolutions(module);
  bind_planners_of_norms(module);
  bind_planner_of_packing(module);
#ifdef TDC_FAST_CUDA
  module.def("cuda_device_count", &cuda_device_count, "GPUs that can be used now; 0 without a driver.");
  module.def("cuda_runtime_version", &cuda_runtime_version, "CUDART_VERSION of the build, such as 13000.");
  module.def("cuda_launch", &cuda_launch, py::arg("launches"), py::arg("device"), py::arg("stream"),
             py::call_guard<py::gil_scoped_release>(),  // the launches are copies; CUDA waits if its queue is full
             "Starts launches in order on a stream (its address, 0 = default) of a device number. Raises RuntimeError "
             "naming kernel, shapes and CUDA's message.");
#endif
}

}  // namespace tdc
