//! What a guest sees of the file system: the host's, without the places of `masks.rs`, with a resolver
//! configuration, terminals, processes and interfaces of its own. mount_namespaces(7).
//!
//! Everything made here lives in temporary file systems of the guest's mount namespace and is gone with
//! it. They are prepared under [`WORKSHOP`], which ends as the guest's own `/proc`.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt as _};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::error::{Failure, Step};
use super::masks::Places;
use super::sockets::Opened;
use super::{pins, sys, userns, writes};

/// Where mounts are prepared: it exists everywhere, and nothing else below it is needed meanwhile.
const WORKSHOP: &str = "/proc";
/// The most entries that a rebuilt directory keeps. The rest are hidden as well.
const MAX_ENTRIES: usize = 2048;
/// Where resolvers look.
const RESOLV_CONF: &str = "/etc/resolv.conf";
const NONE: Option<&str> = None;

/// What a guest's view is made of.
pub(crate) struct View<'a> {
    /// What is hidden, vnet's own among it.
    pub(crate) places: &'a Places,
    /// Vnet's own files and directories, hidden or not, which nothing is to take the place of.
    pub(crate) own: &'a [PathBuf],
    /// Vnet's own programs.
    pub(crate) programs: &'a [PathBuf],
    /// Sockets that are shown although they may lie where something is hidden.
    pub(crate) opened: &'a [Opened],
    /// Where alone may be written, if that is said.
    pub(crate) writable: Option<&'a [PathBuf]>,
    /// Its resolver configuration.
    pub(crate) resolv_conf: &'a str,
    /// Where the command starts.
    pub(crate) cwd: Option<&'a Path>,
}

/// Makes the guest's view, to be called in its mount namespace by the first process of its PID namespace.
/// Returns what could not be had and does not matter much.
pub(crate) fn set_up(view: &View<'_>) -> Result<Vec<String>, Failure> {
    let mut notes = Vec::new();
    // Nothing that is mounted here is seen outside, nor the reverse.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .map_err(|errno| userns::refused("keep the guest's mounts to itself", errno))?;
    temporary(Path::new(WORKSHOP), "mode=0755")
        .map_err(|errno| userns::refused("mount a temporary file system", errno))?;
    let workshop = Workshop::open()?;

    pins::pin(view.own.iter().chain(view.programs))?;
    for program in view.programs {
        pins::seal(program)?;
    }
    hide_all(view, &workshop, &mut notes)?;
    give_resolv_conf(view.resolv_conf)?;
    mount_sys(&workshop, &mut notes);
    if let Some(writable) = view.writable {
        writes::restrict(writable, view.cwd)?;
    }
    mount(
        Some("devpts"),
        "/dev/pts",
        Some("devpts"),
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some("newinstance,ptmxmode=0666,mode=0620"),
    )
    .step("give the guest terminals of its own at /dev/pts")?;
    workshop.close()?;
    mount_proc()?;
    close_kernel_settings(&mut notes);
    // The kernel refuses to execute a file whose capabilities could not all be had; ping is such a file on
    // some systems, and needs none here. Without set-id they count for nothing, and it runs.
    if let Err(errno) = sys::set_nosuid_everywhere() {
        let cause = errno.desc();
        notes.push(format!(
            "programs with file capabilities cannot be executed: {cause}"
        ));
    }
    Ok(notes)
}

/// Hides what is to be hidden, and shows in its place what is opened.
fn hide_all(view: &View<'_>, workshop: &Workshop, notes: &mut Vec<String>) -> Result<(), Failure> {
    let mut opened = Vec::new();
    for socket in view.opened {
        let step = || format!("show the socket {}", socket.path.display());
        opened.push((&socket.path, sys::copy_mount(&socket.path, false).step(step())?));
    }
    let mut hidden = existing(&view.places.hidden);
    hidden.retain(|path| !opened.iter().any(|(socket, _)| *socket == path));
    for directory in existing(&view.places.rebuilt) {
        if view.cwd == Some(&directory) {
            // New files of the command's would be lost in a copy: cover what is there instead.
            notes.push(format!(
                "files made later in {} are not hidden",
                directory.display()
            ));
        } else if is_private(&directory) {
            rebuild(&directory, &hidden, notes)?;
        }
    }
    let mut covered = Vec::new();
    for path in &hidden {
        if hide(path, workshop)? {
            covered.push(path);
        }
    }
    for (path, tree) in &opened {
        if !path.exists() {
            let step = || format!("show the socket {}", path.display());
            path.parent()
                .map_or(Ok(()), fs::create_dir_all)
                .and_then(|()| write_new(path, ""))
                .step(step())?;
            sys::place_mount(tree, path).step(step())?;
        }
    }
    for path in covered {
        read_only(path).step(format!("hide {}", path.display()))?;
    }
    Ok(())
}

/// Makes `path` say `text` in the mount namespace of this process. For [`stage`](super::stage) too.
pub(crate) fn replace_resolv_conf(text: &str) -> Result<(), Failure> {
    temporary(Path::new(WORKSHOP), "mode=0755").step("mount a temporary file system")?;
    let workshop = Workshop::open()?;
    give_resolv_conf(text)?;
    workshop.close()
}

/// The temporary file system in which mounts are prepared.
struct Workshop {
    /// An empty file.
    empty: PathBuf,
    /// The control groups of the host, held while `/sys` is replaced.
    cgroup: Option<PathBuf>,
}

impl Workshop {
    fn open() -> Result<Workshop, Failure> {
        let empty = Path::new(WORKSHOP).join("empty");
        write_new(&empty, "").step("make a file in the guest's temporary file system")?;
        let cgroup = Path::new(WORKSHOP).join("cgroup");
        let kept = make_directory(&cgroup, 0o755).is_ok() && bind("/sys/fs/cgroup".as_ref(), &cgroup).is_ok();
        Ok(Workshop {
            empty,
            cgroup: kept.then_some(cgroup),
        })
    }

    /// Takes the workshop away; what was moved or bound out of it stays.
    fn close(self) -> Result<(), Failure> {
        umount2(WORKSHOP, MntFlags::MNT_DETACH).step("unmount the guest's workshop")
    }
}

/// The real paths of those that exist, outer ones first, none below another.
fn existing(paths: &[PathBuf]) -> Vec<PathBuf> {
    let mut real: Vec<PathBuf> = paths
        .iter()
        .filter_map(|path| fs::canonicalize(path).ok())
        .collect();
    real.sort();
    real.dedup();
    real.retain(|path| path.parent().is_some());
    real
}

/// Whether a copy may take its place: what is below `/run` ends with the machine anyway; elsewhere only where
/// nobody but the user makes files. A variable may name a shared directory by mistake, and in a copy of
/// `/tmp` the command's files would be lost.
fn is_private(directory: &Path) -> bool {
    const WRITABLE_BY_OTHERS: u32 = 0o022;
    fs::metadata(directory).is_ok_and(|metadata| {
        metadata.is_dir() && (directory.starts_with("/run") || metadata.mode() & WRITABLE_BY_OTHERS == 0)
    })
}

/// Replaces a directory by a copy that has all its entries but the hidden ones: directories and files are
/// the same as outside, the list of them is not. What appears there later does so on one side only.
fn rebuild(directory: &Path, hidden: &[PathBuf], notes: &mut Vec<String>) -> Result<(), Failure> {
    let shown = directory.display();
    let (Ok(entries), Ok(metadata)) = (fs::read_dir(directory), fs::metadata(directory)) else {
        // What the user may not list, the command may not either; the single places are still covered.
        return Ok(());
    };
    let copy = Path::new(WORKSHOP).join("copy");
    match fs::create_dir(&copy) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Failure::new(format!("make a copy of {shown}"), error));
        }
        _ => {}
    }
    temporary(&copy, &format!("mode={:o}", metadata.mode() & 0o7777)).step(format!("copy {shown}"))?;
    for (count, entry) in entries.enumerate() {
        if count == MAX_ENTRIES {
            notes.push(format!(
                "{shown} has more than {MAX_ENTRIES} entries; the others are hidden"
            ));
            break;
        }
        let Ok(entry) = entry else { break };
        if !hidden.contains(&entry.path()) {
            // An entry that cannot be shown (gone by now, or not ours to see) stays hidden.
            let _ = show(&entry.path(), &copy.join(entry.file_name()));
        }
    }
    mount(Some(&copy), directory, NONE, MsFlags::MS_MOVE, NONE).step(format!("replace {shown} by its copy"))
}

/// Shows `original` as `copy`.
fn show(original: &Path, copy: &Path) -> io::Result<()> {
    let kind = fs::symlink_metadata(original)?.file_type();
    if kind.is_symlink() {
        return symlink(fs::read_link(original)?, copy);
    }
    if kind.is_dir() {
        make_directory(copy, 0o755)?;
        return bind(original, copy).or_else(|error| {
            fs::remove_dir(copy)?;
            Err(error.into())
        });
    }
    write_new(copy, "")?;
    bind(original, copy).or_else(|error| {
        fs::remove_file(copy)?;
        Err(error.into())
    })
}

/// Covers a directory by an empty one, anything else by an empty file; false if there is nothing to cover.
fn hide(path: &Path, workshop: &Workshop) -> Result<bool, Failure> {
    let covered = match fs::symlink_metadata(path) {
        // Hidden with its parent, or gone.
        Err(_) => return Ok(false),
        Ok(metadata) if metadata.is_dir() => temporary(path, "mode=0555"),
        Ok(_) => bind(&workshop.empty, path),
    };
    match covered {
        Ok(()) => Ok(true),
        // Not reachable for the helper, which may do no less than the command.
        Err(Errno::EACCES | Errno::ENOENT) => Ok(false),
        Err(error) => Err(Failure::new(format!("hide {}", path.display()), error)),
    }
}

/// Puts a resolver configuration in the place of the host's, wherever that is.
fn give_resolv_conf(text: &str) -> Result<(), Failure> {
    let ours = Path::new(WORKSHOP).join("resolv.conf");
    write_new(&ours, text).step("write the guest's resolv.conf")?;
    let placed = match fs::canonicalize(RESOLV_CONF) {
        Ok(target) => bind(&ours, &target),
        // A link that leads nowhere, or into a place that is hidden: the link itself is covered.
        Err(_) if fs::symlink_metadata(RESOLV_CONF).is_ok() => sys::copy_mount(&ours, false)
            .and_then(|tree| sys::place_mount(&tree, Path::new(RESOLV_CONF)))
            .or_else(|_| overlay_etc(text)),
        Err(_) => overlay_etc(text),
    };
    placed.step("put the guest's resolv.conf in the place of /etc/resolv.conf")?;
    // Its owner is the command's user; whether it may be changed does not matter much.
    let _ = read_only(Path::new(RESOLV_CONF));
    Ok(())
}

/// Lays a directory with nothing but our file over `/etc`.
fn overlay_etc(text: &str) -> nix::Result<()> {
    let layer = Path::new(WORKSHOP).join("etc");
    make_directory(&layer, 0o755)
        .and_then(|()| write_new(&layer.join("resolv.conf"), text))
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    let options = format!("lowerdir={}:/etc", layer.display());
    mount(
        Some("overlay"),
        "/etc",
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_str()),
    )
}

/// A `/sys` with the guest's interfaces, where the system permits it, with the host's control groups.
fn mount_sys(workshop: &Workshop, notes: &mut Vec<String>) {
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    match mount(Some("sysfs"), "/sys", Some("sysfs"), flags, NONE) {
        Ok(()) => {
            if let Some(cgroup) = &workshop.cgroup {
                let _ = bind(cgroup, "/sys/fs/cgroup".as_ref());
            }
        }
        Err(error) => notes.push(format!("/sys shows the host's interfaces: {}", error.desc())),
    }
}

/// A `/proc` with the guest's processes alone.
fn mount_proc() -> Result<(), Failure> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, NONE).map_err(|errno| {
        let remedy = matches!(errno, Errno::EPERM | Errno::EACCES).then(|| {
            "parts of /proc are covered, as in a container; start the container with\n  \
             --security-opt systempaths=unconfined   (docker)\n  \
             --security-opt unmask=ALL   (podman)"
                .to_owned()
        });
        Failure {
            step: "give the guest a /proc of its own".into(),
            cause: errno.desc().into(),
            remedy,
        }
    })
}

/// Makes the kernel's settings read-only and hides what leads into the kernel. To an ordinary user they are
/// closed anyway; a run by root would otherwise write them with root's own identity.
fn close_kernel_settings(notes: &mut Vec<String>) {
    const READ_ONLY: [&str; 4] = ["/proc/sys", "/proc/irq", "/proc/bus", "/proc/fs"];
    const HIDDEN: [&str; 5] = [
        "/proc/sysrq-trigger",
        "/proc/kcore",
        "/proc/kmsg",
        "/proc/keys",
        "/dev/kmsg",
    ];
    let bind = |from: &str, to: &str| mount(Some(from), to, NONE, MsFlags::MS_BIND, NONE);
    let read_only = MsFlags::MS_BIND
        | MsFlags::MS_REMOUNT
        | MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    for path in READ_ONLY.into_iter().filter(|path| Path::new(path).exists()) {
        if let Err(errno) = bind(path, path).and_then(|()| mount(NONE, path, NONE, read_only, NONE)) {
            notes.push(format!("{path} cannot be made read-only: {}", errno.desc()));
        }
    }
    for path in HIDDEN.into_iter().filter(|path| Path::new(path).exists()) {
        if let Err(errno) = bind("/dev/null", path) {
            notes.push(format!("{path} cannot be hidden: {}", errno.desc()));
        }
    }
}

/// Mounts an empty temporary file system.
fn temporary(target: &Path, options: &str) -> nix::Result<()> {
    mount(
        Some("tmpfs"),
        target,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(options),
    )
}

/// Shows a file or a directory, with what is mounted below it, in a second place.
fn bind(source: &Path, target: &Path) -> nix::Result<()> {
    mount(
        Some(source),
        target,
        NONE,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        NONE,
    )
}

/// Makes one of our mounts read-only.
fn read_only(target: &Path) -> nix::Result<()> {
    let flags = MsFlags::MS_REMOUNT
        | MsFlags::MS_BIND
        | MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    mount(NONE, target, NONE, flags, NONE)
}

/// Makes a directory with exactly these permissions at most.
fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    fs::DirBuilder::new().mode(mode).create(path)
}

/// Makes a readable file.
fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .open(path)?;
    io::Write::write_all(&mut file, text.as_bytes())
}

/// A guest's resolver configuration. The patience is that of a person who is asked about a name.
pub(crate) fn resolv_conf(gateway: std::net::Ipv4Addr) -> String {
    format!("nameserver {gateway}\noptions timeout:30 attempts:2\n")
}

/// A path as it goes over the wire.
pub(crate) fn path_bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

/// Paths that came over the wire.
pub(crate) fn paths(bytes: Vec<Vec<u8>>) -> Vec<PathBuf> {
    bytes
        .into_iter()
        .map(|bytes| OsString::from_vec(bytes).into())
        .collect()
}
