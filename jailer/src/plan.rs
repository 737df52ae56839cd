//! From the command line to a [`Plan`]: everything is found, checked and opened here, while the host is still there.

use std::os::unix::net::UnixListener;
use std::path::{Component, Path, PathBuf};

use rustix::fs::FileType;

use crate::cli::{Cli, UserNamespace};
use crate::descriptors::Handed;
use crate::error::{JailError, refused_at};
use crate::instance::Instance;
use crate::launch::{Plan, VMM};
use crate::root::{Contents, Mount, Node, Use};
use crate::sysfs::Parts;
use crate::{libraries, trusted};

const KVM: &str = "/dev/kvm";
const SYSFS: &str = "/sys";

/// Plans the jail that `cli` asks for.
///
/// # Errors
/// What is missing, of the wrong kind, or not only root's to change.
pub fn plan(
    cli: &Cli,
    instance: &Instance,
    handed: &mut Handed,
    listener: Option<UnixListener>,
) -> Result<Plan, JailError> {
    let mut contents = Contents::default();
    let run = instance.make_run(cli.uid, cli.gid)?;
    contents.mounts.push(Mount::clone_fd(&run, true, "/run".into(), Use::Write)?);
    add_program(cli, &mut contents)?;
    add_shares(cli, &mut contents)?;
    let mut sysfs = Parts::default();
    add_devices(cli, &mut contents, &mut sysfs)?;
    for tap in &cli.tap {
        sysfs.add_interface(Path::new(SYSFS), &tap.name);
    }
    for folder in sysfs.folders {
        let found = trusted::find(&folder, None)?;
        contents.mounts.push(Mount::clone_of(&found, folder, Use::Read)?);
    }
    contents.links = sysfs.links;
    // Those above others first, so that one that would hide another is noticed.
    contents.mounts.sort_by(|one, other| one.target.cmp(&other.target));
    let mut arguments = vec!["rackvisor".to_owned()];
    if let Some(listener) = listener {
        arguments.push(format!("--api-fd={}", handed.add(listener)?));
    }
    arguments.extend(cli.arguments.iter().cloned());
    Ok(Plan {
        name: cli.id.to_string(),
        uid: cli.uid,
        gid: cli.gid,
        contents,
        place: instance.path().to_owned(),
        user_namespace: cli.userns == UserNamespace::Private,
        limits: cli.rlimit.clone(),
        keep: handed.numbers.clone(),
        arguments,
    })
}

fn add_program(cli: &Cli, contents: &mut Contents) -> Result<(), JailError> {
    let beside = || std::env::current_exe().map(|own| own.with_file_name("rackvisor"));
    let path = cli.vmm.clone().map_or_else(beside, Ok).map_err(refused_at("find the VMM", Path::new("rackvisor")))?;
    let program = trusted::find(&path, None)?;
    program.only_owner_writes()?;
    for library in libraries::of(&program)? {
        let found = trusted::find(&library, None)?;
        found.only_owner_writes()?;
        contents.mounts.push(Mount::clone_of(&found, library, Use::Execute)?);
    }
    contents.mounts.push(Mount::clone_of(&program, VMM.into(), Use::Execute)?);
    Ok(())
}

fn add_shares(cli: &Cli, contents: &mut Contents) -> Result<(), JailError> {
    for (paths, purpose) in [(&cli.share, Use::Write), (&cli.share_ro, Use::Read)] {
        for path in paths {
            let found = trusted::find(path, Some(cli.uid))?;
            if !found.is_folder() && found.kind() != FileType::RegularFile {
                return Err(JailError::Unusable(format!("--share {}: it is no folder and no file", path.display())));
            }
            contents.mounts.push(Mount::clone_of(&found, target(path)?, purpose)?);
        }
    }
    Ok(())
}

fn add_devices(cli: &Cli, contents: &mut Contents, sysfs: &mut Parts) -> Result<(), JailError> {
    let kvm = PathBuf::from(KVM);
    let writable = cli.device.iter().chain((!cli.device.contains(&kvm)).then_some(&kvm)).map(|path| (path, false));
    for (path, read_only) in writable.chain(cli.device_ro.iter().map(|path| (path, true))) {
        let found = trusted::find(path, None)?;
        let kind = found.kind();
        if !matches!(kind, FileType::BlockDevice | FileType::CharacterDevice) {
            return Err(JailError::Unusable(format!("--device {}: it is no device", path.display())));
        }
        let device = found.stat.st_rdev;
        if kind == FileType::BlockDevice {
            sysfs.add_block(Path::new(SYSFS), device);
        }
        contents.nodes.push(Node { path: target(path)?, kind, device, read_only });
    }
    Ok(())
}

/// Where something of the host is in the jail: at the same path.
fn target(path: &Path) -> Result<PathBuf, JailError> {
    let path = std::path::absolute(path).map_err(refused_at("find", path))?;
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(JailError::Unusable(format!("{}: give a path without `..`", path.display())));
    }
    Ok(path)
}
