//! The root of a jail, built from nothing.
//!
//! Everything that comes from the host is opened and cloned as a detached mount while the jailer is still outside ([`Mount::clone_of`]);
//! inside, it is attached to a tmpfs, on descriptors only. Nothing is built in the host's file system, so there is nothing in which somebody
//! could put a link, and nothing that a jailer that is killed would leave behind.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, mkdirat, mknodat, openat, openat2, symlinkat,
};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree, unmount,
};

use crate::error::{JailError, refused, refused_at};
use crate::sys;
use crate::trusted::Found;

/// Bytes and files that the tmpfs may hold: it has nothing but folders, mount points and device nodes.
const ROOM: [(&str, &str); 3] = [("size", "1m"), ("nr_inodes", "4096"), ("mode", "0755")];

/// A file or folder of the host, on its way into a jail.
#[derive(Debug)]
pub struct Mount {
    /// Where it will be.
    pub target: PathBuf,
    tree: OwnedFd,
    is_folder: bool,
}

/// What a mount is good for. None has devices or gives privileges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Reading and writing.
    Write,
    /// Reading.
    Read,
    /// Reading and executing.
    Execute,
}

impl Mount {
    /// Takes what was found, without the mounts below it, to where it will be in the jail.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn clone_of(found: &Found, target: PathBuf, purpose: Use) -> Result<Self, JailError> {
        Self::clone_fd(&found.fd, found.is_folder(), target, purpose)
    }

    /// As [`Mount::clone_of`] for an open folder.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn clone_fd(fd: impl AsFd, is_folder: bool, target: PathBuf, purpose: Use) -> Result<Self, JailError> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = open_tree(fd, "", flags).map_err(refused_at("clone the mount of", &target))?;
        let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
        if purpose != Use::Execute {
            attributes |= libc::MOUNT_ATTR_NOEXEC;
        }
        if purpose != Use::Write {
            attributes |= libc::MOUNT_ATTR_RDONLY;
        }
        sys::restrict_mount(&tree, attributes).map_err(refused_at("restrict the mount of", &target))?;
        Ok(Self { target, tree, is_folder })
    }
}

/// A device node of a jail.
#[derive(Debug)]
pub struct Node {
    /// Where.
    pub path: PathBuf,
    /// Block or character.
    pub kind: FileType,
    /// Its number.
    pub device: u64,
    /// Whether it is for reading only.
    pub read_only: bool,
}

/// Everything that a jail's root has.
#[derive(Debug, Default)]
pub struct Contents {
    /// From the host, those above others first.
    pub mounts: Vec<Mount>,
    /// Device nodes.
    pub nodes: Vec<Node>,
    /// Links and where they lead.
    pub links: Vec<(PathBuf, PathBuf)>,
}

/// Makes the root, on `place` of this mount namespace, and moves into it. The nodes belong to `uid` and `gid`.
///
/// # Errors
/// What the kernel refused; the namespace is of no use then.
pub fn enter(contents: &Contents, place: &Path, uid: u32, gid: u32) -> Result<(), JailError> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(refused("part this mount namespace from the host's"))?;
    let root = Root::new(place)?;
    for mount in &contents.mounts {
        root.attach(mount)?;
    }
    for node in &contents.nodes {
        root.make_node(node, uid, gid)?;
    }
    for (link, target) in &contents.links {
        let (folder, name) = root.parent_of(link)?;
        symlinkat(target, &folder, &name).map_err(refused_at("make the link", link))?;
    }
    root.attach_proc()?;
    root.enter()
}

struct Root(OwnedFd);

impl Root {
    fn new(place: &Path) -> Result<Self, JailError> {
        let made = (|| {
            let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
            for (key, value) in ROOM {
                fsconfig_set_string(context.as_fd(), key, value)?;
            }
            fsconfig_create(context.as_fd())?;
            let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NOSUID)?;
            move_mount(root.as_fd(), "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
            Ok::<_, Errno>(root)
        })();
        Ok(Self(made.map_err(refused("make a file system in memory"))?))
    }

    /// Opens something that this part has made: never through a link or in a mount, which would be the host's.
    fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let path = if path == Path::new("") { Path::new(".") } else { path };
        openat2(&self.0, path, flags | OFlags::CLOEXEC, Mode::empty(), within)
    }

    /// Makes the folders above `path`, of which it gives the last one, and the name in it.
    fn parent_of(&self, path: &Path) -> Result<(OwnedFd, OsString), JailError> {
        let inside: PathBuf = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        let name = inside.file_name().ok_or_else(|| taken(path))?;
        let mut made = PathBuf::new();
        for part in inside.parent().into_iter().flat_map(Path::components) {
            let above =
                self.open(&made, OFlags::PATH | OFlags::DIRECTORY).map_err(refused_at("open in the jail", path))?;
            match mkdirat(&above, part.as_os_str(), Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => (),
                Err(error) => return Err(refused_at("make in the jail", path)(error)),
            }
            made.push(part);
        }
        match self.open(&made, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::XDEV | Errno::NOTDIR | Errno::LOOP) => Err(taken(path)),
            folder => Ok((folder.map_err(refused_at("open in the jail", path))?, name.to_owned())),
        }
    }

    /// Makes what a mount covers.
    fn make_place(&self, path: &Path, is_folder: bool) -> Result<OwnedFd, JailError> {
        let (folder, name) = self.parent_of(path)?;
        let mode = Mode::from_raw_mode(0o755);
        let made = match is_folder {
            true => mkdirat(&folder, &name, mode),
            false => openat(&folder, &name, OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC, mode).map(drop),
        };
        match made {
            // A folder that something else is in is not taken yet; a second mount on it would be.
            Ok(()) => (),
            Err(Errno::EXIST) if is_folder => (),
            Err(Errno::EXIST) => return Err(taken(path)),
            Err(error) => return Err(refused_at("make in the jail", path)(error)),
        }
        let inside: PathBuf = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        self.open(&inside, OFlags::PATH | OFlags::NOFOLLOW).map_err(|error| match error {
            Errno::XDEV => taken(path),
            error => refused_at("open in the jail", path)(error),
        })
    }

    fn attach(&self, mount: &Mount) -> Result<(), JailError> {
        let place = self.make_place(&mount.target, mount.is_folder)?;
        attach(&mount.tree, &place).map_err(refused_at("mount in the jail", &mount.target))
    }

    fn attach_proc(&self) -> Result<(), JailError> {
        let place = self.make_place(Path::new("/proc"), true)?;
        let made = (|| {
            let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
            // Only the processes of the jail: nothing of the kernel's settings and tables.
            fsconfig_set_string(context.as_fd(), "subset", "pid")?;
            fsconfig_create(context.as_fd())?;
            let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
                | MountAttrFlags::MOUNT_ATTR_NODEV
                | MountAttrFlags::MOUNT_ATTR_NOEXEC
                | MountAttrFlags::MOUNT_ATTR_RDONLY;
            let proc = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
            attach(&proc, &place)
        })();
        made.map_err(refused("mount /proc in the jail; Linux 5.12 or newer is needed"))
    }

    fn make_node(&self, node: &Node, uid: u32, gid: u32) -> Result<(), JailError> {
        let (folder, name) = self.parent_of(&node.path)?;
        let mode = Mode::from_raw_mode(if node.read_only { 0o400 } else { 0o600 });
        mknodat(&folder, &name, node.kind, mode, node.device).map_err(|error| match error {
            Errno::EXIST => taken(&node.path),
            error => refused_at("make the device", &node.path)(error),
        })?;
        let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        chownat(&folder, &name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(refused_at("give away the device", &node.path))
    }

    /// Makes it the root of this process and leaves the host's behind.
    fn enter(self) -> Result<(), JailError> {
        let fixed = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
        sys::restrict_mount(&self.0, fixed).map_err(refused("make the jail's root read-only"))?;
        let moved = (|| {
            rustix::process::fchdir(&self.0)?;
            // The old root is put on top of the new one, from where it is taken away.
            rustix::process::pivot_root(".", ".")?;
            unmount(".", UnmountFlags::DETACH)?;
            rustix::process::chdir("/")
        })();
        moved.map_err(refused("enter the jail's root"))
    }
}

fn attach(tree: impl AsFd, place: impl AsFd) -> rustix::io::Result<()> {
    let on_descriptors = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree.as_fd(), "", place.as_fd(), "", on_descriptors)
}

fn taken(path: &Path) -> JailError {
    let text =
        "the jail has this path, or one above it, already: name each thing once, and nothing that is inside of another";
    JailError::Unusable(format!("{}: {text}", path.display()))
}
