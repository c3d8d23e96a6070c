//! Entering the namespaces: user_namespaces(7), with the diagnosis of what stands in the way.
//!
//! That a user namespace could be made proves little: some distributions make one whose capabilities do
//! nothing. So what follows it (the maps, the other namespaces, a mount, an interface that comes up) is
//! the test, and every refusal on the way is explained by [`diagnose`].

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
    let others = CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWPID;
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
            unshare(others).map_err(|errno| refused("make namespaces inside the user namespace", errno))?;
            Ok(made)
        }
        // Real root needs no user namespace where those are forbidden.
        Err(errno) => {
            drop(mapper);
            let made = between()?;
            unshare(others).map_err(|_| refused("make a user namespace", errno))?;
            Ok(made)
        }
    }
}

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
        remedy: diagnose(errno, &Host::read()),
    }
}

/// What the system says about its user namespaces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Host {
    /// `kernel.unprivileged_userns_clone` (Debian's patch).
    userns_clone: Option<u64>,
    /// `user.max_user_namespaces`.
    max_user_namespaces: Option<u64>,
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
            max_user_namespaces: number("/proc/sys/user/max_user_namespaces"),
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

/// What to do about a refusal, where the system's settings tell.
fn diagnose(errno: Errno, host: &Host) -> Option<String> {
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
    if host.max_user_namespaces == Some(0) || errno == Errno::ENOSPC {
        return Some(format!(
            "user.max_user_namespaces is {}; raise it with\n  sudo sysctl -w user.max_user_namespaces=15000",
            host.max_user_namespaces
                .map_or_else(|| "used up".into(), |n| n.to_string()),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        Host {
            supported: true,
            max_user_namespaces: Some(1000),
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
            diagnose(Errno::EPERM, &debian)
                .unwrap()
                .contains("kernel.unprivileged_userns_clone=1")
        );
        let none = Host {
            max_user_namespaces: Some(0),
            ..host()
        };
        assert!(
            diagnose(Errno::ENOSPC, &none)
                .unwrap()
                .contains("user.max_user_namespaces=15000")
        );
        let ubuntu = Host {
            apparmor_restricts: Some(1),
            ..host()
        };
        let told = diagnose(Errno::EACCES, &ubuntu).unwrap();
        assert!(told.contains("profile vnetctl \"/opt/vnetctl\"") && told.contains("apparmor_parser -r"));
        let container = Host {
            seccomp: true,
            ..host()
        };
        assert!(
            diagnose(Errno::EPERM, &container)
                .unwrap()
                .contains("seccomp=unconfined")
        );
        assert!(
            diagnose(Errno::EPERM, &Host::default())
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
