"""What pyproject.toml cannot say: the package is spread over top-level folders, and it has an extension in C."""

from setuptools import Extension, setup

import build_backend

setup(
    packages=build_backend.packages(),
    package_dir=build_backend.package_dir(),
    ext_modules=[
        Extension(
            "df11._kernels",
            sources=[
                "src/df11/_kernels.c",
                "formats/cpu.c",
                "formats/decode.c",
                "converter/encode.c",
                "converter/sha256.c",
                "converter/dfloat11/kernels.c",
            ],
            depends=["formats/kernels.h", "converter/dfloat11/kernels.h"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if build_backend.LIMITED else [],
            py_limited_api=build_backend.LIMITED,
        )
    ],
    cmdclass={"build_ext": build_backend.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if build_backend.LIMITED else {},
)
