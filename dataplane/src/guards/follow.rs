//! Following the host's addresses, and its default route over IPv6, as they change.
//!
//! Linux says so over a route netlink socket (rtnetlink(7), groups of address and IPv6 route changes); what
//! changed is not read from it, the addresses are listed and the route is looked up anew. Elsewhere that is
//! done every [`POLL_EVERY`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::egress::way::{ANYWHERE, has_way};
use crate::guards::{Guards, HostAddresses};
use crate::message::{Order, Report, Router};
use crate::metrics::Metrics;

/// Waits for the host's addresses to change. Opened before the dataplane confines itself.
#[derive(Debug)]
pub struct Watcher {
    #[cfg(target_os = "linux")]
    netlink: std::os::fd::OwnedFd,
}

impl Watcher {
    /// Starts to watch.
    ///
    /// # Errors
    /// The host's error when it gives no netlink socket.
    #[cfg(target_os = "linux")]
    pub fn open() -> io::Result<Self> {
        use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket};
        use std::os::fd::AsRawFd as _;

        let netlink = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        let groups =
            nix::libc::RTMGRP_IPV4_IFADDR | nix::libc::RTMGRP_IPV6_IFADDR | nix::libc::RTMGRP_IPV6_ROUTE;
        bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, groups.cast_unsigned()))?;
        Ok(Self { netlink })
    }

    /// Starts to watch.
    ///
    /// # Errors
    /// Never, here.
    #[cfg(not(target_os = "linux"))]
    pub fn open() -> io::Result<Self> {
        Ok(Self {})
    }
}

/// Keeps `guards` current for as long as it is polled. Each change is reported and voids every cached
/// verdict. Addresses that changed before this call are caught by listing them once at its beginning.
///
/// # Errors
/// The host's error when the watch itself breaks. The caller ends the dataplane then: stale guards would
/// open the host's new addresses.
pub async fn follow(
    watcher: Watcher,
    guards: Arc<Guards>,
    metrics: Arc<Metrics>,
    reports: mpsc::Sender<Report>,
    router: Arc<dyn Router>,
) -> io::Result<()> {
    let mut changes = Changes::new(watcher)?;
    loop {
        match HostAddresses::enumerate() {
            Ok(host) => {
                if guards.set_host(host) {
                    let addresses = guards.host_addresses();
                    tracing::info!(addresses = addresses.len(), "the host's addresses changed");
                    metrics.guard_changes.increment();
                    // Voided first: a verdict that is wrong for the new address must not answer while
                    // the report waits for room.
                    router.broadcast(&Order::GuardsChanged);
                    if reports.send(Report::HostAddresses(addresses)).await.is_err() {
                        return Ok(());
                    }
                }
                metrics.host_addresses.set(guards.host_addresses().len() as u64);
            }
            Err(error) => tracing::warn!(%error, "the host's addresses cannot be listed; keeping the last"),
        }
        if guards.set_ipv6(has_way(ANYWHERE)) {
            tracing::info!(
                has_ipv6 = guards.has_ipv6(),
                "the host's way out over IPv6 changed"
            );
            router.broadcast(&Order::WayChanged);
        }
        changes.next().await?;
    }
}

#[cfg(target_os = "linux")]
struct Changes {
    netlink: tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>,
}

#[cfg(target_os = "linux")]
impl Changes {
    fn new(watcher: Watcher) -> io::Result<Self> {
        // SAFETY: an OwnedFd is open and is the same descriptor for as long as it lives, and it lives
        // inside the AsyncFd until that is dropped.
        let netlink = unsafe { tokio::io::unix::AsyncFd::register(watcher.netlink) }?;
        Ok(Self { netlink })
    }

    /// Returns at the first notice, and not again within [`SETTLE`], so that a host that makes a hundred
    /// interfaces is not listed a hundred times.
    async fn next(&mut self) -> io::Result<()> {
        tokio::time::sleep(SETTLE).await;
        loop {
            let mut ready = self.netlink.readable().await?;
            let noticed = drain(ready.get_inner())?;
            ready.clear_ready();
            if noticed {
                return Ok(());
            }
        }
    }
}

/// Reads every waiting notice; whether there was one.
#[cfg(target_os = "linux")]
fn drain(netlink: &std::os::fd::OwnedFd) -> io::Result<bool> {
    use nix::errno::Errno;
    use nix::sys::socket::{MsgFlags, recv};
    use std::os::fd::AsRawFd as _;

    let mut buffer = [0; NOTICE_BYTES];
    let mut noticed = false;
    loop {
        match recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            // Lost notices are notices.
            Ok(_) | Err(Errno::ENOBUFS) => noticed = true,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(noticed),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(not(target_os = "linux"))]
struct Changes;

#[cfg(not(target_os = "linux"))]
impl Changes {
    fn new(_watcher: Watcher) -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> io::Result<()> {
        tokio::time::sleep(POLL_EVERY).await;
        Ok(())
    }
}

/// How long after one listing the next may come.
#[cfg(target_os = "linux")]
const SETTLE: Duration = Duration::from_millis(100);

/// How often addresses are listed where the host does not say that they changed.
#[cfg(not(target_os = "linux"))]
const POLL_EVERY: Duration = Duration::from_secs(2);

/// Room for one notice; what does not fit is cut off, unread anyway.
#[cfg(target_os = "linux")]
const NOTICE_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::sync::Mutex;

    use vnet_proto::model::VmId;

    use super::*;
    use crate::message::Input;

    /// Counts how often cached verdicts were voided.
    #[derive(Default)]
    struct Voided(Mutex<usize>);

    impl Router for Voided {
        fn send(&self, _vm: VmId, _input: Input) -> bool {
            false
        }

        fn broadcast(&self, order: &Order) -> Vec<VmId> {
            match order {
                Order::GuardsChanged => *self.0.lock().unwrap() += 1,
                Order::WayChanged => {}
                other => panic!("{other:?}"),
            }
            Vec::new()
        }

        fn vms(&self) -> Vec<VmId> {
            Vec::new()
        }

        fn guest_at(&self, _address: IpAddr) -> Option<VmId> {
            None
        }

        fn seek(&self, _address: IpAddr) -> bool {
            false
        }

        fn is_open(&self) -> bool {
            false
        }
    }

    /// Follows the host's addresses in whatever network namespace this thread is in.
    fn followed(act: impl AsyncFnOnce(Arc<Guards>, Arc<Voided>, mpsc::Receiver<Report>)) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (reports, received) = mpsc::channel(8);
            let (guards, router) = (Arc::<Guards>::default(), Arc::<Voided>::default());
            let following = follow(
                Watcher::open().unwrap(),
                Arc::clone(&guards),
                Arc::default(),
                reports,
                Arc::clone(&router) as Arc<dyn Router>,
            );
            tokio::select! {
                ended = following => panic!("{ended:?}"),
                () = act(guards, router, received) => {}
                () = tokio::time::sleep(Duration::from_secs(10)) => panic!("nothing was reported in time"),
            }
        });
    }

    #[test]
    fn addresses_that_changed_before_it_began_are_caught() {
        followed(async |guards, router, mut received| {
            let Some(Report::HostAddresses(addresses)) = received.recv().await else {
                panic!()
            };
            assert_eq!(addresses, guards.host_addresses());
            assert_eq!(*router.0.lock().unwrap(), 1);
        });
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_new_address_is_guarded_at_once_and_a_removed_one_no_more() {
        // In a thread of its own, whose network namespace ends with it.
        std::thread::spawn(guarded_in_a_namespace_of_its_own)
            .join()
            .unwrap();
    }

    #[cfg(target_os = "linux")]
    fn guarded_in_a_namespace_of_its_own() {
        use nix::sched::{CloneFlags, unshare};
        use std::process::Command;
        use vnet_proto::model::{Guard, Protocol};

        if unshare(CloneFlags::CLONE_NEWNET).is_err() {
            eprintln!("skipped: this user may not make a network namespace outside a user namespace");
            return;
        }
        let ip = |arguments: &str| {
            let status = Command::new("ip")
                .args(arguments.split(' '))
                .status()
                .expect("iproute2 is installed");
            assert!(status.success(), "ip {arguments}");
        };
        ip("link set lo up");
        followed(async |guards, router, mut received| {
            let address: IpAddr = "10.1.2.3".parse().unwrap();
            let host = || guards.classify(address, 80, Protocol::Tcp).contains(Guard::Host);
            received.recv().await.unwrap();
            assert!(!host());

            ip("addr add 10.1.2.3/32 dev lo");
            assert!(matches!(received.recv().await, Some(Report::HostAddresses(a)) if a == [address]));
            assert!(host());

            ip("addr del 10.1.2.3/32 dev lo");
            assert!(matches!(received.recv().await, Some(Report::HostAddresses(a)) if a.is_empty()));
            assert!(!host());
            assert_eq!(*router.0.lock().unwrap(), 3);

            assert!(!guards.has_ipv6());
            ip("-6 addr add fd00:1::1/128 dev lo");
            received.recv().await.unwrap();
            ip("-6 route add default dev lo");
            while !guards.has_ipv6() {
                tokio::task::yield_now().await;
            }
            ip("-6 route del default dev lo");
            while guards.has_ipv6() {
                tokio::task::yield_now().await;
            }
        });
    }
}
