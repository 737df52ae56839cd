//! Paths that nobody but root can change.
//!
//! The jailer is root and acts on paths of the command line, so whoever can exchange a part of one of them, be it only for a moment,
//! would make it act on something else. Here a path is walked part by part, each opened below the one before (never by the whole
//! path), without following links: each folder and each link on the way must belong to root, and no folder may be writable by others,
//! unless it is sticky and the next part is root's. Links that pass are followed by this walk, not by the kernel. What is handed out is a
//! descriptor, on which everything else is done.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat};

use crate::error::{JailError, refused_at};

/// As many as the kernel follows.
const MAX_LINKS: usize = 40;
const WRITABLE_BY_OTHERS: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// What a path led to.
#[derive(Debug)]
pub struct Found {
    /// The object, opened with `O_PATH`.
    pub fd: OwnedFd,
    /// The path that leads there without links.
    pub path: PathBuf,
    /// What it was when it was opened.
    pub stat: Stat,
}

impl Found {
    /// What kind of object it is.
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    /// Whether it is a folder.
    pub fn is_folder(&self) -> bool {
        self.kind() == FileType::Directory
    }

    /// That nobody but its owner can write to it.
    ///
    /// # Errors
    /// [`JailError::Untrusted`].
    pub fn only_owner_writes(&self) -> Result<(), JailError> {
        if self.stat.st_mode & WRITABLE_BY_OTHERS == 0 {
            return Ok(());
        }
        let reason = format!("it is writable by others (mode {:o})", self.stat.st_mode & 0o7777);
        Err(JailError::Untrusted { path: self.path.clone(), reason })
    }
}

/// Walks `path`, whose end must belong to root, or to `owner` if one is given.
///
/// # Errors
/// [`JailError::Untrusted`] if somebody else could change where it leads; what the kernel refused.
pub fn find(path: &Path, owner: Option<u32>) -> Result<Found, JailError> {
    let whole = std::path::absolute(path).map_err(refused_at("find", path))?;
    let mut walk = Walk::begin(path)?;
    walk.push_front(&whole);
    while let Some(part) = walk.parts.pop_front() {
        if let Some(end) = walk.step(&part, owner)? {
            return Ok(end);
        }
    }
    walk.end(owner)
}

/// The folder that `path` is or will be in, which belongs to root, and the last part.
///
/// # Errors
/// As [`find`]; a path without a last part.
pub fn parent(path: &Path) -> Result<(Found, OsString), JailError> {
    let whole = std::path::absolute(path).map_err(refused_at("find", path))?;
    let (Some(folder), Some(name)) = (whole.parent(), whole.file_name()) else {
        return Err(JailError::Unusable(format!("{}: give the path of a file", path.display())));
    };
    let folder = find(folder, None)?;
    if !folder.is_folder() {
        return Err(JailError::Unusable(format!("{} is no folder", folder.path.display())));
    }
    Ok((folder, name.to_owned()))
}

struct Walk<'a> {
    wanted: &'a Path,
    /// The folders from the root on, with their names.
    folders: Vec<(OwnedFd, Stat, OsString)>,
    root: (OwnedFd, Stat),
    parts: VecDeque<OsString>,
    links: usize,
}

impl<'a> Walk<'a> {
    fn begin(wanted: &'a Path) -> Result<Self, JailError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(CWD, "/", flags, Mode::empty()).map_err(refused_at("open", Path::new("/")))?;
        let stat = fstat(&fd).map_err(refused_at("examine", Path::new("/")))?;
        check_folder(wanted, &stat, Path::new("/"))?;
        Ok(Self { wanted, folders: Vec::new(), root: (fd, stat), parts: VecDeque::new(), links: 0 })
    }

    /// What is to be walked next.
    fn push_front(&mut self, path: &Path) {
        if path.is_absolute() {
            self.folders.clear();
        }
        for component in path.components().rev() {
            match component {
                Component::Normal(name) => self.parts.push_front(name.to_owned()),
                Component::ParentDir => self.parts.push_front(OsString::from("..")),
                _ => (),
            }
        }
    }

    fn folder(&self) -> (&OwnedFd, &Stat) {
        self.folders.last().map_or((&self.root.0, &self.root.1), |(fd, stat, _)| (fd, stat))
    }

    fn real(&self, name: &OsStr) -> PathBuf {
        let mut real = PathBuf::from("/");
        real.extend(self.folders.iter().map(|(.., name)| name));
        real.push(name);
        real
    }

    /// One part further; gives the end if that was it.
    fn step(&mut self, part: &OsStr, owner: Option<u32>) -> Result<Option<Found>, JailError> {
        if part == ".." {
            self.folders.pop();
            return Ok(None);
        }
        let real = self.real(part);
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(self.folder().0, part, flags, Mode::empty()).map_err(refused_at("open", &real))?;
        let stat = fstat(&fd).map_err(refused_at("examine", &real))?;
        let is_last = self.parts.is_empty();
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => {
                check_owner(self.wanted, &stat, &real, None)?;
                self.links += 1;
                if self.links > MAX_LINKS {
                    return Err(untrusted(self.wanted, &real, "is one link too many"));
                }
                let target = readlinkat(&fd, "", Vec::new()).map_err(refused_at("read the link", &real))?;
                self.push_front(Path::new(OsStr::from_bytes(target.as_bytes())));
            }
            FileType::Directory if !is_last => {
                check_owner(self.wanted, &stat, &real, None)?;
                check_folder(self.wanted, &stat, &real)?;
                self.folders.push((fd, stat, part.to_owned()));
            }
            _ if !is_last => return Err(JailError::Unusable(format!("{} is no folder", real.display()))),
            _ => {
                check_owner(self.wanted, &stat, &real, owner)?;
                return Ok(Some(Found { fd, path: real, stat }));
            }
        }
        Ok(None)
    }

    /// The end of a path that ends in a folder that was walked through, such as `/` or `a/..`.
    fn end(mut self, owner: Option<u32>) -> Result<Found, JailError> {
        let path = self.real(OsStr::new(""));
        let wanted = self.wanted;
        let (fd, stat) = self.folders.pop().map_or(self.root, |(fd, stat, _)| (fd, stat));
        let path: PathBuf = path.components().collect();
        check_owner(wanted, &stat, &path, owner)?;
        Ok(Found { fd, path, stat })
    }
}

fn check_owner(wanted: &Path, stat: &Stat, at: &Path, owner: Option<u32>) -> Result<(), JailError> {
    if stat.st_uid == 0 || Some(stat.st_uid) == owner {
        return Ok(());
    }
    Err(untrusted(wanted, at, &format!("belongs to uid {}", stat.st_uid)))
}

fn check_folder(wanted: &Path, stat: &Stat, at: &Path) -> Result<(), JailError> {
    // In a sticky folder nobody can rename or remove what is root's, and all that is walked is.
    if stat.st_mode & WRITABLE_BY_OTHERS == 0 || stat.st_mode & STICKY != 0 {
        return Ok(());
    }
    Err(untrusted(wanted, at, &format!("is writable by others (mode {:o})", stat.st_mode & 0o7777)))
}

fn untrusted(wanted: &Path, at: &Path, reason: &str) -> JailError {
    JailError::Untrusted { path: wanted.into(), reason: format!("{} {reason}", at.display()) }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    fn is_root() -> bool {
        let root = rustix::process::geteuid().is_root();
        if !root {
            eprintln!("SKIPPED: this test makes files of other users, which takes root");
        }
        root
    }

    fn refusal(path: &Path) -> String {
        match find(path, None) {
            Err(JailError::Untrusted { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn links_of_root_are_followed_and_the_end_is_told_without_them() {
        if !is_root() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("a/b")).unwrap();
        fs::write(at("a/file"), "x").unwrap();
        symlink("../file", at("a/b/up")).unwrap();
        symlink(at("a/b"), at("there")).unwrap();
        let found = find(&at("there/up"), None).unwrap();
        assert_eq!(found.path, at("a/file"));
        assert!(!found.is_folder());
        assert_eq!(find(&at("a/b/.."), None).unwrap().path, at("a"));
        assert_eq!(find(Path::new("/"), None).unwrap().path, Path::new("/"));
        symlink("loop", at("loop")).unwrap();
        assert!(refusal(&at("loop")).contains("one link too many"));
        assert!(matches!(find(&at("absent"), None), Err(JailError::Refused { .. })));
        assert!(matches!(find(&at("a/file/below"), None), Err(JailError::Unusable(_))));
    }

    #[test]
    fn what_somebody_else_owns_or_can_write_to_is_refused_wherever_it_is_on_the_way() {
        if !is_root() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("a/b")).unwrap();
        fs::write(at("a/b/file"), "x").unwrap();
        let file = at("a/b/file");
        find(&file, None).unwrap();

        chown(at("a"), Some(12345), None).unwrap();
        assert!(refusal(&file).contains("/a belongs to uid 12345"));
        chown(at("a"), Some(0), None).unwrap();
        fs::set_permissions(at("a/b"), fs::Permissions::from_mode(0o775)).unwrap();
        assert!(refusal(&file).contains("/b is writable by others (mode 775)"));
        fs::set_permissions(at("a/b"), fs::Permissions::from_mode(0o1777)).unwrap();
        find(&file, None).unwrap();

        chown(&file, Some(12345), None).unwrap();
        assert!(refusal(&file).contains("/file belongs to uid 12345"));
        assert_eq!(find(&file, Some(12345)).unwrap().stat.st_uid, 12345);

        symlink("b", at("a/link")).unwrap();
        std::os::unix::fs::lchown(at("a/link"), Some(12345), None).unwrap();
        assert!(refusal(&at("a/link")).contains("/link belongs to uid 12345"));
    }
}
