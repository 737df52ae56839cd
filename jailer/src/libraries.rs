//! The libraries that a program needs, so that its jail has these and no others.
//!
//! A static program needs none. For a dynamic one the kernel opens its loader in the jail, and that the libraries. They are mounted
//! read-only from the host, file by file: a copy for each VM would cost memory for each, while mounted ones share the page cache.
//! Which they are the loader itself tells (`--list`, as ldd does), before anything of the jail is there.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Mode, OFlags};

use crate::error::{JailError, refused_at};
use crate::trusted::Found;

/// ELF-64 specification: the file header, then program headers of 56 bytes.
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PT_INTERP: u32 = 3;
/// No path is longer.
const MAX_PATH: usize = 4096;

/// The files that `program` needs besides itself, by the paths that it looks for them at.
///
/// # Errors
/// It is no ELF program, or one of them is missing.
pub fn of(program: &Found) -> Result<Vec<PathBuf>, JailError> {
    let at = &program.path;
    let readable = format!("/proc/self/fd/{}", program.fd.as_fd().as_raw_fd());
    let file = rustix::fs::open(&readable, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(refused_at("read the program", at))?;
    let Some(loader) = loader(&File::from(file), at)? else { return Ok(Vec::new()) };
    // It runs in another process, which sees the same file by the number of this one.
    let readable = format!("/proc/{}/fd/{}", std::process::id(), program.fd.as_fd().as_raw_fd());
    let listed = Command::new(&loader).arg("--list").arg(&readable).env_clear().output();
    let listed = listed.map_err(refused_at("run the loader", &loader))?;
    if !listed.status.success() {
        let text = String::from_utf8_lossy(&listed.stderr);
        return Err(JailError::Unusable(format!("{} cannot be loaded: {}", at.display(), text.trim())));
    }
    let mut files = parse(&String::from_utf8_lossy(&listed.stdout), at)?;
    if !files.contains(&loader) {
        files.push(loader);
    }
    Ok(files)
}

/// The loader that the program names, if it is dynamic.
fn loader(file: &File, at: &Path) -> Result<Option<PathBuf>, JailError> {
    let no_program = || JailError::Unusable(format!("{} is no ELF program for this machine", at.display()));
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0).map_err(|_| no_program())?;
    // Class 2 has 64 bits, data 1 is little-endian.
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return Err(no_program());
    }
    let (offset, count) = (number(&header, 32, 8), number(&header, 56, 2));
    for index in 0..count {
        let mut entry = [0; PROGRAM_HEADER];
        let start = index.checked_mul(PROGRAM_HEADER as u64).and_then(|from| from.checked_add(offset));
        file.read_exact_at(&mut entry, start.ok_or_else(no_program)?).map_err(|_| no_program())?;
        if number(&entry, 0, 4) != u64::from(PT_INTERP) {
            continue;
        }
        let length = usize::try_from(number(&entry, 32, 8)).unwrap_or(MAX_PATH).min(MAX_PATH);
        let mut path = vec![0; length];
        file.read_exact_at(&mut path, number(&entry, 8, 8)).map_err(|_| no_program())?;
        let path = String::from_utf8(path).map_err(|_| no_program())?;
        return Ok(Some(PathBuf::from(path.trim_end_matches('\0'))));
    }
    Ok(None)
}

/// The little-endian number of `size` bytes at `offset`; 0 where there is none.
fn number(bytes: &[u8], offset: usize, size: usize) -> u64 {
    let field = bytes.get(offset..).and_then(|rest| rest.get(..size)).unwrap_or_default();
    field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`, `linux-vdso.so.1 (0x…)`.
fn parse(listed: &str, at: &Path) -> Result<Vec<PathBuf>, JailError> {
    let mut files = Vec::new();
    for line in listed.lines().map(str::trim) {
        let (name, found) = line.split_once(" => ").unwrap_or((line, line));
        if found.starts_with("not found") {
            return Err(JailError::Unusable(format!("{} needs {name}, which this host lacks", at.display())));
        }
        let path = PathBuf::from(found.rsplit_once(" (").map_or(found, |(path, _)| path));
        // The kernel's own, and "statically linked", have none.
        if path.is_absolute() && !files.contains(&path) {
            files.push(path);
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_needs_its_loader_and_its_libraries() {
        // /bin/sh is a link, and where /bin leads depends on the distribution.
        let program = crate::trusted::find(Path::new("/bin/sh"), None).unwrap();
        let files = of(&program).unwrap();
        let has = |name: &str| {
            files.iter().any(|file| file.file_name().is_some_and(|f| f.to_string_lossy().starts_with(name)))
        };
        assert!(has("ld-linux") && has("libc.so"), "{files:?}");
        assert!(files.iter().all(|file| file.is_file()), "{files:?}");
    }

    #[test]
    fn a_program_that_is_none_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for content in [&b""[..], b"#!/bin/sh\n", &[0x7f; 64], b"\x7fELF\x01\x01"] {
            std::fs::write(file.path(), content).unwrap();
            assert!(matches!(loader(file.as_file(), file.path()), Err(JailError::Unusable(_))), "{content:?}");
        }
        let mut hostile = vec![0; 200];
        hostile[..6].copy_from_slice(b"\x7fELF\x02\x01");
        hostile[32..40].fill(0xff);
        hostile[56..58].fill(0xff);
        std::fs::write(file.path(), &hostile).unwrap();
        assert!(loader(file.as_file(), file.path()).is_err());
    }

    #[test]
    fn what_the_loader_lists_is_understood() {
        let listed = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibm.so.6 => /lib/libm.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let files = parse(listed, Path::new("/x")).unwrap();
        assert_eq!(files, [PathBuf::from("/lib/libm.so.6"), PathBuf::from("/lib64/ld-linux-x86-64.so.2")]);
        let error = parse("\tlibx.so => not found\n", Path::new("/x")).unwrap_err().to_string();
        assert!(error.contains("needs libx.so"), "{error}");
        assert!(parse("\tstatically linked\n", Path::new("/x")).unwrap().is_empty());
    }
}
