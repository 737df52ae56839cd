//! Pages of guest RAM that go back to the host.
#![allow(unsafe_code)] // madvise(2) has no safe wrapper among our dependencies.

use std::io;

use vm_memory::GuestRegionMmap;

/// Gives a part of `region` back to the host, `length` bytes from `offset` on: it reads as zeros until it is written. Both are
/// multiples of the host's page size.
///
/// # Errors
/// `EINVAL` for what is not in the region or not made of whole pages (of huge ones, where these back it); else what the kernel answered.
pub fn give_back(region: &GuestRegionMmap, offset: u64, length: u64) -> io::Result<()> {
    let whole = || {
        let (offset, length) = (usize::try_from(offset).ok()?, usize::try_from(length).ok()?);
        (offset.checked_add(length)? <= region.size()).then_some((offset, length))
    };
    let (offset, length) = whole().ok_or(io::ErrorKind::InvalidInput)?;
    // The pages of a memory file stay in the file unless they are taken out of it.
    let advice = if region.flags() & libc::MAP_SHARED != 0 { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    // SAFETY: the range lies within a mapping that `region` owns, as was checked; its content is the guest's, to which nobody holds a
    // reference, and it stays mapped.
    match unsafe { libc::madvise(region.as_ptr().wrapping_add(offset).cast(), length, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::{Bytes, FileOffset, GuestAddress, MemoryRegionAddress, MmapRegion};

    use super::*;

    const PAGE: u64 = 4096;

    #[test]
    fn pages_of_a_memory_file_leave_the_file() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(8 * PAGE).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let region = MmapRegion::from_file(offset, 8 * PAGE as usize).unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
        region.write_slice(&[1; 8 * PAGE as usize], MemoryRegionAddress(0)).unwrap();
        let blocks = file.metadata().unwrap().blocks();
        give_back(&region, PAGE, 3 * PAGE).unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), blocks / 8 * 5);
        let mut bytes = [9; 2];
        region.read_slice(&mut bytes, MemoryRegionAddress(4 * PAGE - 1)).unwrap();
        assert_eq!(bytes, [0, 1]);
    }

    #[test]
    fn what_is_outside_or_no_page_is_refused() {
        let region = GuestRegionMmap::new(MmapRegion::new(8 * PAGE as usize).unwrap(), GuestAddress(0)).unwrap();
        for (offset, length) in [(0, 9 * PAGE), (8 * PAGE, PAGE), (u64::MAX, 1), (u64::MAX, PAGE), (100, PAGE)] {
            let error = give_back(&region, offset, length).unwrap_err();
            assert!(matches!(error.kind(), io::ErrorKind::InvalidInput), "{offset:#x}+{length:#x}");
        }
        give_back(&region, 0, 8 * PAGE).unwrap();
    }
}
