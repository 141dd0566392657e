/* C API of libkimi_plugins.so, for programs that load it themselves.
 *
 * Loading the library (dlopen, trtexec --staticPlugins, Polygraphy --plugins, ctypes) registers its plugins with every
 * TensorRT that the process has loaded; IPluginRegistry::loadLibrary (trtexec --dynamicPlugins) does so through
 * getCreators. A program that loads TensorRT later calls kimi_plugins_register then. Nothing here needs TensorRT's
 * headers, and the kernels' C ABI (kimi_kernels.h) is exported too.
 */
#ifndef KIMI_PLUGINS_H_
#define KIMI_PLUGINS_H_

#include "../kernels/kimi_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Registers every plugin with every TensorRT of this process that does not have it yet; calling it again changes
 * nothing. Returns how many of those TensorRTs have all plugins of this library now, or -1; then kimi_plugins_error
 * says why, as it does where one of several was refused. */
KIMI_API int32_t kimi_plugins_register(void);

/* What kimi_plugins_register refused or could not do, empty if nothing. Valid until it is called again. */
KIMI_API const char* kimi_plugins_error(void);

/* Gives errors to `callback` instead of to TensorRT's logger, one line each; NULL: to TensorRT again. For programs that
 * use plugins without TensorRT. */
KIMI_API void kimi_plugins_on_error(void (*callback)(const char* message));

/* Number of plugins; name and ABI hash of one. The ABI is an empty string for ONNX's own operators; both are NULL for
 * an index out of range. */
KIMI_API int32_t kimi_plugins_count(void);
KIMI_API const char* kimi_plugins_name(int32_t index);
KIMI_API const char* kimi_plugins_abi(int32_t index);

#ifdef __cplusplus
}
#endif

#endif /* KIMI_PLUGINS_H_ */
