//! Entering the namespaces: user_namespaces(7), with the diagnosis of what stands in the way.
//!
//! That a user namespace could be made proves little: some distributions make one whose capabilities do
//! nothing. So what follows it (the maps, the other namespaces, a mount, an interface that comes up) is
//! the test, and every refusal on the way is explained by [`diagnose`].

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, getegid, geteuid, getpid};

use super::error::{Failure, Step};

/// Leaves the caller's user, network, mount, IPC and UTS namespaces, and its PID namespace for the
/// children to come. The process must have one thread only. `between` is done in the user namespace and in the
/// caller's others: whom it forks stays outside of the guest's processes.
///
/// An ordinary user is mapped to itself, so that its files look as before; where the caller may map
/// more ids (root), every id that it has is mapped to itself.
pub(crate) fn enter<T>(between: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    // Inside, every limit on namespaces reads as if there were none.
    let host = Host::read();
    // Asked before: inside, until they are mapped, both read as the overflow id.
    let (uid, gid) = (geteuid(), getegid());
    let mapper = if uid.is_root() {
        Some(Mapper::fork()?)
    } else {
        None
    };
    match unshare(CloneFlags::CLONE_NEWUSER) {
        Ok(()) => {
            let mapped = mapper.is_some_and(Mapper::map);
            if !mapped {
                map_self(uid, gid).map_err(|errno| refused("map the user into its user namespace", errno))?;
            }
            let made = between()?;
            for (kind, word, limit) in KINDS {
                unshare(kind).map_err(|errno| Failure {
                    step: format!("make a {word} namespace inside the user namespace"),
                    cause: errno.desc().into(),
                    remedy: diagnose(errno, &host, limit),
                })?;
            }
            Ok(made)
        }
        // Real root needs no user namespace where those are forbidden.
        Err(errno) => {
            drop(mapper);
            let made = between()?;
            for (kind, ..) in KINDS {
                unshare(kind).map_err(|_| refused("make a user namespace", errno))?;
            }
            Ok(made)
        }
    }
}

/// The namespaces in the user namespace, what they are called, and as what their limits count them: one at a time,
/// so that a refusal is that of one kind.
const KINDS: [(CloneFlags, &str, &str); 5] = [
    (CloneFlags::CLONE_NEWNET, "network", "net"),
    (CloneFlags::CLONE_NEWNS, "mount", "mnt"),
    (CloneFlags::CLONE_NEWIPC, "IPC", "ipc"),
    (CloneFlags::CLONE_NEWUTS, "UTS", "uts"),
    (CloneFlags::CLONE_NEWPID, "PID", "pid"),
];

/// A child that stays in the parent user namespace: only from there can more than one id be mapped.
struct Mapper {
    child: Pid,
    go: std::io::PipeWriter,
}

impl Mapper {
    fn fork() -> Result<Mapper, Failure> {
        let target = getpid();
        let (mut waits, go) = std::io::pipe().step("make a pipe")?;
        // SAFETY: the process has one thread, so the child may do whatever its parent may.
        match unsafe { fork() }.step("fork the process that maps user ids")? {
            ForkResult::Parent { child } => Ok(Mapper { child, go }),
            ForkResult::Child => {
                drop(go);
                let told = waits.read_exact(&mut [0]).is_ok();
                let code = if told && map_all(target).is_ok() { 0 } else { 1 };
                // SAFETY: ends the child without running the parent's exit handlers.
                unsafe { libc::_exit(code) }
            }
        }
    }

    /// Maps the ids of this process, which has entered its user namespace by now.
    fn map(mut self) -> bool {
        self.go.write_all(&[1]).is_ok() && matches!(waitpid(self.child, None), Ok(WaitStatus::Exited(_, 0)))
    }
}

/// Maps every id of the namespace that this process is in to itself.
fn map_all(target: Pid) -> std::io::Result<()> {
    for map in ["uid_map", "gid_map"] {
        let mine = fs::read_to_string(format!("/proc/self/{map}"))?;
        fs::write(format!("/proc/{target}/{map}"), identity_of(&mine))?;
    }
    Ok(())
}

/// The map of a child namespace in which every id that `parent` maps means the same.
fn identity_of(parent: &str) -> String {
    let mut map = String::new();
    for line in parent.lines() {
        let mut fields = line.split_whitespace();
        if let (Some(first), Some(_), Some(count)) = (fields.next(), fields.next(), fields.next()) {
            map += &format!("{first} {first} {count}\n");
        }
    }
    map
}

/// Maps this one user and group. Group ids can only be mapped once setgroups(2) is given up.
fn map_self(uid: Uid, gid: Gid) -> nix::Result<()> {
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("{uid} {uid} 1"))?;
    write("/proc/self/gid_map", &format!("{gid} {gid} 1"))
}

fn write(path: &str, text: &str) -> nix::Result<()> {
    let file = nix::fcntl::open(
        path,
        nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )?;
    match nix::unistd::write(file.as_fd(), text.as_bytes())? {
        n if n == text.len() => Ok(()),
        _ => Err(Errno::EIO),
    }
}

/// The failure of a step that needs the namespaces' capabilities, with what stands in the way.
pub(crate) fn refused(step: &str, errno: Errno) -> Failure {
    Failure {
        step: step.into(),
        cause: errno.desc().into(),
        remedy: diagnose(errno, &Host::read(), USER),
    }
}

/// What the system says about its user namespaces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Host {
    /// `kernel.unprivileged_userns_clone` (Debian's patch).
    userns_clone: Option<u64>,
    /// What there may be of each kind of namespaces (`user.max_user_namespaces` and its like), by kind.
    limits: BTreeMap<&'static str, u64>,
    /// `kernel.apparmor_restrict_unprivileged_userns` (Ubuntu 23.10 and later).
    apparmor_restricts: Option<u64>,
    /// A seccomp filter is on this process: a container's, most likely.
    seccomp: bool,
    /// The kernel knows user namespaces.
    supported: bool,
    /// This program, for the profile that helps.
    program: String,
}

impl Host {
    fn read() -> Host {
        let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse().ok();
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Host {
            userns_clone: number("/proc/sys/kernel/unprivileged_userns_clone"),
            limits: KINDS
                .iter()
                .map(|(.., kind)| *kind)
                .chain([USER])
                .filter_map(|kind| Some((kind, number(&format!("/proc/sys/user/max_{kind}_namespaces"))?)))
                .collect(),
            apparmor_restricts: number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
            seccomp: status
                .lines()
                .any(|line| line.split_whitespace().eq(["Seccomp:", "2"])),
            supported: fs::exists("/proc/self/ns/user").unwrap_or(false),
            program: std::env::current_exe()
                .map_or_else(|_| "/usr/bin/vnetctl".into(), |path| path.display().to_string()),
        }
    }
}

/// What to do about a refusal of a namespace of this kind, where the system's settings tell.
fn diagnose(errno: Errno, host: &Host, kind: &str) -> Option<String> {
    if !host.supported {
        return Some(
            "this kernel has no user namespaces (CONFIG_USER_NS); use one that has, or run as root".into(),
        );
    }
    if host.userns_clone == Some(0) {
        return Some(
            "user namespaces are switched off for ordinary users; switch them on with\n  \
             sudo sysctl -w kernel.unprivileged_userns_clone=1"
                .into(),
        );
    }
    let limit = host.limits.get(kind);
    if limit == Some(&0) || errno == Errno::ENOSPC {
        return Some(format!(
            "user.max_{kind}_namespaces is {}; raise it with\n  sudo sysctl -w user.max_{kind}_namespaces={LIMIT}",
            match limit {
                Some(0) => "0".to_owned(),
                Some(limit) => format!("used up ({limit})"),
                None => "used up".to_owned(),
            },
        ));
    }
    if host.apparmor_restricts == Some(1) {
        let program = &host.program;
        return Some(format!(
            "AppArmor takes the capabilities of user namespaces from programs without a profile \
             (kernel.apparmor_restrict_unprivileged_userns is 1); allow them to this program with\n  \
             sudo tee /etc/apparmor.d/vnetctl <<'END'\n  \
             abi <abi/4.0>,\n  \
             include <tunables/global>\n  \
             profile vnetctl \"{program}\" flags=(unconfined) {{\n    userns,\n  }}\n  \
             END\n  \
             sudo apparmor_parser -r /etc/apparmor.d/vnetctl\n\
             or, for every program until the next start of the machine, with\n  \
             sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
        ));
    }
    if host.seccomp {
        return Some(
            "a seccomp filter is in force, as in a container; start the container with\n  \
             --security-opt seccomp=unconfined --security-opt systempaths=unconfined --device /dev/net/tun"
                .into(),
        );
    }
    match errno {
        Errno::EACCES => Some(
            "a security module refused it; `sudo ausearch -m avc -ts recent` or `sudo dmesg` names the \
             rule"
                .into(),
        ),
        Errno::EPERM => Some(
            "inside a chroot or a container that is to be expected; run it outside, or as root with \
             CAP_SYS_ADMIN"
                .into(),
        ),
        _ => None,
    }
}

/// User namespaces, as their limit counts them.
const USER: &str = "user";
/// Enough of any kind of namespaces.
const LIMIT: u32 = 15_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        Host {
            supported: true,
            limits: [(USER, 1000), ("net", 1000)].into(),
            program: "/opt/vnetctl".into(),
            ..Host::default()
        }
    }

    #[test]
    fn each_obstacle_is_named_with_its_remedy() {
        let debian = Host {
            userns_clone: Some(0),
            ..host()
        };
        assert!(
            diagnose(Errno::EPERM, &debian, USER)
                .unwrap()
                .contains("kernel.unprivileged_userns_clone=1")
        );
        for kind in [USER, "net"] {
            let none = Host {
                limits: [(kind, 0)].into(),
                ..host()
            };
            assert_eq!(
                diagnose(Errno::ENOSPC, &none, kind).unwrap(),
                format!(
                    "user.max_{kind}_namespaces is 0; raise it with\n  sudo sysctl -w user.max_{kind}_namespaces=15000"
                )
            );
            let told = diagnose(Errno::ENOSPC, &host(), kind).unwrap();
            assert!(
                told.starts_with(&format!("user.max_{kind}_namespaces is used up (1000); raise it")),
                "{told}"
            );
        }
        let ubuntu = Host {
            apparmor_restricts: Some(1),
            ..host()
        };
        let told = diagnose(Errno::EACCES, &ubuntu, USER).unwrap();
        assert!(told.contains("profile vnetctl \"/opt/vnetctl\"") && told.contains("apparmor_parser -r"));
        let container = Host {
            seccomp: true,
            ..host()
        };
        assert!(
            diagnose(Errno::EPERM, &container, USER)
                .unwrap()
                .contains("seccomp=unconfined")
        );
        assert!(
            diagnose(Errno::EPERM, &Host::default(), USER)
                .unwrap()
                .contains("CONFIG_USER_NS")
        );
    }

    #[test]
    fn ids_of_the_parent_mean_the_same_in_the_child() {
        assert_eq!(
            identity_of("         0     100000       10\n  500  1 2\n"),
            "0 0 10\n500 500 2\n"
        );
    }
}
