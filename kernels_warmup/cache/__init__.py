"""Compiled artifacts kept between process starts.

After a good warm-up, inductor's cache directory is packed into one archive; the next start unpacks
it. Loading artifacts one by one would leave most of the work to do again; the whole directory
leaves next to none.

    folder/     chosen by the operator, often a network file system that many runners share
        nvidia-h100-80gb-hbm3-torch-2.13.0-0a1b2c3d4e5f6071.stepspan-cache
    /tmp/stepspan-inductor-x7k2q9ab/     private to this process, mode 0700: inductor compiles here

- `compile_cache`: restores an archive, stores it, discards it.
- `key`: what decides whether artifacts can be used again.
- `working_directory`: the process's own directory on the local disk.
- `trust`: whether a folder can be loaded from at all.
- `archive`: the directory as one file, checked before it is unpacked.

A process reads the folder once and writes it once, always a whole file. So processes that start at
the same time need no lock, and no process sees what another one left half-written.

**Loading compiled artifacts runs code.** The folder must be as trusted as the program itself. An
archive that another user could have written is refused.

The same holds for every other folder that code is loaded from: inductor's, Triton's, that of
extension modules, and the caches of torch and of the CUDA driver. Their defaults are names that
another user can guess, so without an archive too they are in a directory private to the process.

Artifacts may be unpacked into another directory than the one that they were compiled in: inductor
finds them by keys that contain no path, and the one list of paths that Triton keeps is rewritten.
"""
