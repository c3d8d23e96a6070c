//! A host and an internet, made without privilege, for tests and the demo.
//!
//! ```text
//! process ──Stage::command──▶ process in the "host" namespaces ──Stage::build──▶ "internet" namespace
//!                               host0, e.g. 203.0.113.1/24  ════════ wire0, e.g. 203.0.113.10/24
//! ```
//!
//! A user namespace can only be entered by a process with a single thread, so the program is started again
//! ([`command`], [`reexec_self`]) and finds itself root of a network of its own ([`inside`]), with nothing
//! but `lo` in it. There [`Stage::build`] adds the other side. Guests can be made inside
//! ([`spawn`](super::spawn)).

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use ipnet::IpNet;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};

use super::error::{Failure, SandboxError, Step};
use super::mounts;
use super::netlink::Netlink;

/// Set in the environment of a process in a stage's host namespaces.
const MARK: &str = "VNET_STAGE";
/// The host's end of the wire.
const HOST_END: &str = "host0";
/// The internet's end of the wire.
const INTERNET_END: &str = "wire0";
const QUEUE_LENGTH: u32 = 4096;

/// What is to be on either side of the wire.
#[derive(Debug, Clone)]
pub struct StageSpec {
    /// Addresses of the host's end, `203.0.113.1/24`. The first of a family is the internet's router back.
    pub host: Vec<IpNet>,
    /// Addresses of the internet's end, `203.0.113.10/24`, `198.51.100.7/32`. The host has a route to each.
    pub internet: Vec<IpNet>,
    /// The MTU of the wire.
    pub mtu_bytes: u16,
    /// The host's `/etc/resolv.conf`; untouched when `None`.
    pub resolv_conf: Option<String>,
}

impl Default for StageSpec {
    fn default() -> StageSpec {
        let v4 = |a, b, c, d, length| {
            IpNet::from(ipnet::Ipv4Net::new_assert(
                std::net::Ipv4Addr::new(a, b, c, d),
                length,
            ))
        };
        StageSpec {
            host: vec![v4(203, 0, 113, 1, 24)],
            internet: vec![v4(203, 0, 113, 10, 24), v4(198, 51, 100, 7, 32)],
            mtu_bytes: 1500,
            resolv_conf: None,
        }
    }
}

/// A network namespace; it lives as long as a process, a thread or a copy of this is in it.
#[derive(Debug, Clone)]
pub struct NetNs(Arc<OwnedFd>);

/// What [`Stage::build`] has made.
#[derive(Debug)]
pub struct Stage {
    /// Where this process is.
    pub host: NetNs,
    /// The other side of the wire.
    pub internet: NetNs,
}

/// Whether this process is in a stage's host namespaces.
pub fn inside() -> bool {
    std::env::var_os(MARK).is_some()
}

/// A command that starts in new host namespaces: user (the caller is root there, and nobody else exists),
/// network, mount, IPC and UTS. It dies with the thread that starts it.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env(MARK, "1");
    let map = |id: u32| format!("0 {id} 1").into_bytes();
    let files = [
        (c"/proc/self/setgroups", b"deny".to_vec()),
        (c"/proc/self/uid_map", map(nix::unistd::geteuid().as_raw())),
        (c"/proc/self/gid_map", map(nix::unistd::getegid().as_raw())),
    ];
    // SAFETY: between fork and exec this makes plain system calls and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            unshare(CloneFlags::CLONE_NEWUSER)?;
            for (path, text) in &files {
                let fd = Errno::result(libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC))?;
                let file = OwnedFd::from_raw_fd(fd);
                nix::unistd::write(&file, text)?;
            }
            unshare(
                CloneFlags::CLONE_NEWNET
                    | CloneFlags::CLONE_NEWNS
                    | CloneFlags::CLONE_NEWIPC
                    | CloneFlags::CLONE_NEWUTS,
            )?;
            let private = libc::MS_REC | libc::MS_PRIVATE;
            let none = std::ptr::null();
            Errno::result(libc::mount(none, c"/".as_ptr(), none, private, none.cast()))?;
            Ok(())
        });
    }
    command
}

/// Runs this program again, with these arguments, in new host namespaces, and waits for its end.
///
/// A test runs itself so: `reexec_self(["the::test", "--exact", "--nocapture"])`, and does its work where
/// it finds itself [`inside`].
///
/// # Errors
/// The namespaces could not be made, with what helps.
pub fn reexec_self<S: AsRef<OsStr>>(
    arguments: impl IntoIterator<Item = S>,
) -> Result<ExitStatus, SandboxError> {
    command("/proc/self/exe")
        .args(arguments)
        .status()
        .map_err(|error| {
            let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
            SandboxError::Setup(super::userns::refused("make the stage's host namespaces", errno))
        })
}

impl Stage {
    /// Makes the internet and the wire to it, in a process that is [`inside`].
    ///
    /// # Errors
    /// What the system refused.
    pub fn build(spec: &StageSpec) -> Result<Stage, SandboxError> {
        // Whatever thread calls: namespaces of a thread are not to change under its feet.
        let spec = spec.clone();
        let built = thread::spawn(move || build(&spec)).join();
        match built {
            Ok(stage) => stage.map_err(SandboxError::Setup),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn build(spec: &StageSpec) -> Result<Stage, Failure> {
    if !inside() {
        return Err(Failure::new(
            "build a stage",
            "this process was not started by `stage::command`",
        ));
    }
    let host = NetNs::current()?;
    let netlink = Netlink::new()?;
    netlink.up("lo")?;
    netlink.add_veth(HOST_END, INTERNET_END)?;
    netlink.configure(HOST_END, spec.mtu_bytes, QUEUE_LENGTH)?;
    netlink.configure(INTERNET_END, spec.mtu_bytes, QUEUE_LENGTH)?;

    let internet = {
        unshare(CloneFlags::CLONE_NEWNET).step("make the internet's network namespace")?;
        NetNs::current()?
    };
    netlink.move_to(INTERNET_END, internet.0.as_fd())?;
    let far = Netlink::new()?;
    far.up("lo")?;
    for address in &spec.internet {
        far.add_address(INTERNET_END, *address)?;
    }
    far.up(INTERNET_END)?;

    host.enter().step("return to the host's network namespace")?;
    for address in &spec.host {
        netlink.add_address(HOST_END, *address)?;
    }
    netlink.up(HOST_END)?;
    for address in &spec.internet {
        if !spec.host.iter().any(|own| own.contains(&address.addr())) {
            netlink.add_link_route(HOST_END, IpNet::from(address.addr()))?;
        }
    }
    internet.enter().step("enter the internet's network namespace")?;
    for any_v4 in [true, false] {
        if let Some(router) = spec
            .host
            .iter()
            .map(IpNet::addr)
            .find(|own| own.is_ipv4() == any_v4)
        {
            route_back(&far, spec, router)?;
        }
    }
    host.enter().step("return to the host's network namespace")?;

    // The only group that exists here may ping, so that a dataplane can.
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").step("allow ping sockets in the stage")?;
    if let Some(text) = &spec.resolv_conf {
        mounts::replace_resolv_conf(text)?;
    }
    Ok(Stage { host, internet })
}

/// A default route, unless no address of the internet is in the router's subnet.
fn route_back(far: &Netlink, spec: &StageSpec, router: IpAddr) -> Result<(), Failure> {
    if spec.internet.iter().any(|own| own.contains(&router)) {
        return far.add_default_route(router);
    }
    far.add_link_route(INTERNET_END, IpNet::from(router))
}

impl NetNs {
    /// The namespace that this thread is in.
    fn current() -> Result<NetNs, Failure> {
        let file = File::open("/proc/thread-self/ns/net").step("open a network namespace")?;
        Ok(NetNs(Arc::new(file.into())))
    }

    /// Moves the calling thread into it.
    ///
    /// # Errors
    /// The caller lacks `CAP_SYS_ADMIN` in the stage's user namespace.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET)?)
    }
}

/// Runs something on a thread of its own in a network namespace. Sockets stay in the namespace in which
/// they were made; a runtime started inside with one thread makes its sockets there.
pub fn in_namespace<T: Send + 'static>(
    namespace: &NetNs,
    work: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<io::Result<T>> {
    let namespace = namespace.clone();
    thread::spawn(move || {
        namespace.enter()?;
        Ok(work())
    })
}

/// Has a command start in a network namespace.
pub fn command_in(namespace: &NetNs, mut command: Command) -> Command {
    let namespace = namespace.clone();
    // SAFETY: between fork and exec this makes one plain system call and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            Errno::result(libc::setns(namespace.0.as_raw_fd(), libc::CLONE_NEWNET))?;
            Ok(())
        });
    }
    command
}
