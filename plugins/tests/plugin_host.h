/* Drives plugins through the real IPluginV3 interface, for a driver in Python or C: every call is one virtual call that
 * TensorRT makes, with descriptors made from plain numbers. Nothing here runs TensorRT. */
#ifndef KIMI_PLUGIN_HOST_H_
#define KIMI_PLUGIN_HOST_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HOST_API __attribute__((visibility("default")))
#define HOST_MAX_DIMS 8

/* Types and formats are TensorRT's numbers (nvinfer1::DataType, TensorFormat, PluginFieldType). */
typedef struct HostTensor {
  int32_t type;
  int32_t format;
  int32_t rank;
  int32_t reserved;
  int64_t dims[HOST_MAX_DIMS];
  int64_t min[HOST_MAX_DIMS];
  int64_t opt[HOST_MAX_DIMS];
  int64_t max[HOST_MAX_DIMS];
} HostTensor;

typedef struct HostField {
  const char* name;
  const void* data;
  int32_t type;
  int32_t length;
} HostField;

/* A plugin library, whose errors come to this host; NULL with a message. */
HOST_API void* host_open(const char* path);

/* What was logged since the last call, one message a line. Valid until the next call of this function. */
HOST_API const char* host_messages(void);

/* Errors go to TensorRT again. */
HOST_API void host_close(void* library);

/* A creator by name; its version, namespace and fields. */
HOST_API void* host_creator(void* library, const char* name);
HOST_API const char* host_creator_version(void* creator);
HOST_API const char* host_creator_namespace(void* creator);
HOST_API int32_t host_creator_fields(void* creator, HostField* fields, int32_t room);

/* A plugin; phase 0 builds, 1 runs. NULL when it is refused. The caller destroys it. */
HOST_API void* host_create(void* creator, const char* layer, const HostField* fields, int32_t count, int32_t phase);
HOST_API void* host_clone(void* plugin);
HOST_API void* host_attach(void* plugin);
HOST_API void host_destroy(void* plugin);

/* "name version namespace" as the plugin's core interface says them. */
HOST_API const char* host_identity(void* plugin);
HOST_API int32_t host_num_outputs(void* plugin);
HOST_API int32_t host_output_types(void* plugin, const int32_t* inputs, int32_t num_inputs, int32_t* outputs);

/* Ranks and sizes of the outputs, from expressions over the sizes of the inputs that only this host can evaluate. */
HOST_API int32_t host_output_shapes(void* plugin, const HostTensor* inputs, int32_t num_inputs, HostTensor* outputs);
HOST_API int32_t host_supports(void* plugin, int32_t position, const HostTensor* in_out, int32_t num_inputs,
                               int32_t num_outputs);
HOST_API int32_t host_configure(void* plugin, const HostTensor* inputs, int32_t num_inputs, const HostTensor* outputs,
                                int32_t num_outputs);
HOST_API size_t host_workspace(void* plugin, const HostTensor* inputs, int32_t num_inputs, const HostTensor* outputs,
                               int32_t num_outputs);
HOST_API int32_t host_aliased_input(void* plugin, int32_t output);

/* The serialised fields, copied; valid until the plugin serialises again. */
HOST_API int32_t host_serialize(void* plugin, HostField* fields, int32_t room);

HOST_API int32_t host_shape_change(void* plugin, const HostTensor* inputs, int32_t num_inputs,
                                   const HostTensor* outputs, int32_t num_outputs);
HOST_API int32_t host_enqueue(void* plugin, const HostTensor* inputs, int32_t num_inputs, const HostTensor* outputs,
                              int32_t num_outputs, const void* const* input_memory, void* const* output_memory,
                              void* workspace, void* stream);

/* Mean nanoseconds of `count` such calls. */
HOST_API double host_time_enqueue(void* plugin, const HostTensor* inputs, int32_t num_inputs, const HostTensor* outputs,
                                  int32_t num_outputs, const void* const* input_memory, void* const* output_memory,
                                  int32_t count);

#ifdef __cplusplus
}
#endif

#endif /* KIMI_PLUGIN_HOST_H_ */
