//! The guest's one interface and the descriptor at its other end: one Ethernet frame per read or write,
//! whole and checksummed, whichever kind it is.
//!
//! A TAP device (Linux `Documentation/networking/tuntap.rst`) where `/dev/net/tun` may be opened. Else a
//! veth pair whose far end lies alone in a network namespace of its own, with a packet socket
//! (packet(7)) bound to it: that namespace lives as long as the socket, and the guest cannot see it.

use std::fs::{self, OpenOptions};
use std::io;
use std::mem;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use ipnet::{Ipv4Net, Ipv6Net};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use super::error::{Failure, Step};
use super::front::LinkKind;
use super::netlink::{Netlink, index_of};
use super::{sys, userns};

/// What the guest calls its interface.
const INTERFACE: &str = "eth0";
/// What the far end of a veth pair is called, in its own namespace.
const FAR_END: &str = "wire0";
/// Frames that may wait on their way out of the guest; the default of a TAP is too short for a burst.
const QUEUE_LENGTH: u32 = 4096;
/// What a packet socket may hold, where the system allows so much.
const PACKET_BUFFER_BYTES: libc::c_int = 4 << 20;

/// A guest's interface, configured and up.
pub(crate) struct Made {
    /// The other end.
    pub(crate) fd: OwnedFd,
    /// What it is.
    pub(crate) kind: LinkKind,
    /// The guest's MAC address.
    pub(crate) mac: [u8; 6],
    /// What could not be had and does not matter much.
    pub(crate) notes: Vec<String>,
}

/// Makes the guest's interface in the network namespace that this process is in (or, for a veth pair, in
/// a further one, which the process is in afterwards), with its address, MTU and default route.
pub(crate) fn make(
    guest: Ipv4Net,
    gateway: std::net::Ipv4Addr,
    ipv6: Option<(Ipv6Net, Ipv6Addr)>,
    mtu_bytes: u16,
    force_packet_socket: bool,
) -> Result<Made, Failure> {
    let mut notes = Vec::new();
    let tap = if force_packet_socket { None } else { open_tap() };
    let (fd, kind) = match tap {
        Some(fd) => (fd, LinkKind::Tap),
        None => (make_veth(mtu_bytes)?, LinkKind::Packet),
    };
    sys::set_nonblocking(fd.as_fd()).step("make the guest's link non-blocking")?;
    match ipv6 {
        Some(_) => prepare_ipv6(&mut notes),
        None => switch_ipv6_off(&mut notes),
    }
    let netlink = Netlink::new()?;
    // The first thing that needs a capability in the network namespace.
    netlink.up("lo").map_err(|mut failure| {
        failure.remedy = userns::refused("", Errno::EPERM).remedy;
        failure
    })?;
    netlink.configure(INTERFACE, mtu_bytes, QUEUE_LENGTH)?;
    netlink.add_address(INTERFACE, guest.into())?;
    announce_when_up(&mut notes);
    netlink.up(INTERFACE)?;
    netlink.add_default_route(IpAddr::V4(gateway))?;
    if let Some((address, router)) = ipv6 {
        let given = netlink
            .add_address(INTERFACE, address.into())
            .and_then(|()| netlink.add_default_route(IpAddr::V6(router)));
        // A kernel without IPv6 is no reason not to run.
        if let Err(failure) = given {
            notes.push(format!("the command has no IPv6: {failure}"));
        }
    }
    allow_without_capabilities(&mut notes);
    Ok(Made {
        fd,
        kind,
        mac: mac_of(INTERFACE)?,
        notes,
    })
}

/// Has the kernel announce the address (RFC 5227 §2.3) as soon as the interface is up, so that the
/// dataplane knows the guest before it has sent anything: a published port leads to it from the start.
fn announce_when_up(notes: &mut Vec<String>) {
    let path = format!("/proc/sys/net/ipv4/conf/{INTERFACE}/arp_notify");
    if let Err(error) = fs::write(&path, "1") {
        notes.push(format!(
            "a published port works once the command has sent something: {path}: {error}"
        ));
    }
}

/// A TAP device in this namespace, or `None` where the system does not give one.
fn open_tap() -> Option<OwnedFd> {
    // Not there, not allowed, the module is missing, or something else lies there (containers mask it): all the
    // same to the veth pair.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .ok()?;
    let mut request = interface_request(INTERFACE);
    // Both fit: they are bits of a 16-bit field.
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes the ifreq that it is given, which lives on.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    Errno::result(made).ok().map(|_| file.into())
}

/// A veth pair: one end in a new network namespace, which this process enters, the other in the present
/// one, under a packet socket.
fn make_veth(mtu_bytes: u16) -> Result<OwnedFd, Failure> {
    let mut ignored = Vec::new();
    switch_ipv6_off(&mut ignored);
    let far = Netlink::new()?;
    far.add_veth(FAR_END, INTERFACE).map_err(|mut failure| {
        failure.remedy = Some(
            "/dev/net/tun cannot be opened and a veth pair needs the kernel's veth module: \
             `sudo modprobe veth`, or open /dev/net/tun to this user"
                .into(),
        );
        failure
    })?;
    far.configure(FAR_END, mtu_bytes, QUEUE_LENGTH)?;
    switch_offloads_off(FAR_END)?;
    switch_offloads_off(INTERFACE)?;
    let socket = packet_socket(FAR_END)?;
    far.up(FAR_END)?;

    unshare(CloneFlags::CLONE_NEWNET)
        .map_err(|errno| userns::refused("make the guest's network namespace", errno))?;
    let namespace = fs::File::open("/proc/self/ns/net").step("open the guest's network namespace")?;
    far.move_to(INTERFACE, namespace.as_fd())?;
    Ok(socket)
}

/// A packet socket that carries the frames of one interface, those of the other end only.
fn packet_socket(name: &str) -> Result<OwnedFd, Failure> {
    // Protocol 0: it hears nothing until it is bound to its interface.
    // SAFETY: takes numbers and returns a new descriptor.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    let fd = Errno::result(fd).step("open a packet socket")?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };

    // A packet socket hears what it sends itself, unless told not to (Linux 4.20).
    set_option(
        socket.as_fd(),
        libc::SOL_PACKET,
        libc::PACKET_IGNORE_OUTGOING,
        &1i32,
    )
    .step("keep a packet socket from hearing itself")?;
    for (option, forced) in [
        (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE),
        (libc::SO_SNDBUF, libc::SO_SNDBUFFORCE),
    ] {
        if set_option(socket.as_fd(), libc::SOL_SOCKET, forced, &PACKET_BUFFER_BYTES).is_err() {
            // Without the right to force it the system's limit holds, and a burst beyond it is lost.
            set_option(socket.as_fd(), libc::SOL_SOCKET, option, &PACKET_BUFFER_BYTES)
                .step("size a packet socket's buffer")?;
        }
    }
    let index = index_of(name)?;
    // SAFETY: an all-zero value of this plain C struct is valid.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as libc::c_ushort;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index as libc::c_int;
    // SAFETY: the address is live and its size is given.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    Errno::result(bound).step("bind a packet socket")?;
    // Promiscuous: the frames are for the gateway's address, which the far end does not have.
    let member = libc::packet_mreq {
        mr_ifindex: index as libc::c_int,
        mr_type: libc::PACKET_MR_PROMISC as libc::c_ushort,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    set_option(
        socket.as_fd(),
        libc::SOL_PACKET,
        libc::PACKET_ADD_MEMBERSHIP,
        &member,
    )
    .step("make a packet socket promiscuous")?;
    Ok(socket)
}

/// setsockopt(2) with a plain value.
fn set_option<T>(socket: BorrowedFd<'_>, level: i32, name: i32, value: &T) -> nix::Result<()> {
    // SAFETY: the value is live and its size is given; the kernel only reads it.
    Errno::result(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            mem::size_of::<T>() as libc::socklen_t,
        )
    })
    .map(drop)
}

/// Makes an interface compute its checksums and cut its segments itself: frames that never meet a real
/// card would else leave without. `SIOCETHTOOL`, linux/ethtool.h.
fn switch_offloads_off(name: &str) -> Result<(), Failure> {
    /// `struct ethtool_value`.
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    const ETHTOOL_SRXCSUM: u32 = 0x15;
    const ETHTOOL_STXCSUM: u32 = 0x17;
    const ETHTOOL_STSO: u32 = 0x1f;
    const ETHTOOL_SGSO: u32 = 0x24;
    const ETHTOOL_SGRO: u32 = 0x2c;
    // With receive checksums off as well, the guest verifies what it is sent.
    let commands = [
        ETHTOOL_STSO,
        ETHTOOL_SGSO,
        ETHTOOL_STXCSUM,
        ETHTOOL_SRXCSUM,
        ETHTOOL_SGRO,
    ];
    for command in commands {
        let mut value = Value { command, data: 0 };
        let mut request = interface_request(name);
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        match interface_ioctl(libc::SIOCETHTOOL as _, &mut request) {
            Ok(()) => {}
            // What an interface cannot do need not be switched off. Sending whole is what matters.
            Err(Errno::EOPNOTSUPP) if command != ETHTOOL_STXCSUM => {}
            Err(error) => return Err(Failure::new(format!("switch off the offloads of {name}"), error)),
        }
    }
    Ok(())
}

/// The hardware address of an interface.
fn mac_of(name: &str) -> Result<[u8; 6], Failure> {
    let mut request = interface_request(name);
    interface_ioctl(libc::SIOCGIFHWADDR as _, &mut request).step(format!("read the address of {name}"))?;
    // SAFETY: SIOCGIFHWADDR has filled in this member of the union.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    Ok(std::array::from_fn(|i| data[i] as u8))
}

/// A request about a named interface, otherwise zero.
fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: an all-zero value of this plain C struct is valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // One less than there is room for: the name stays terminated.
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1]
        .iter_mut()
        .zip(name.bytes())
    {
        *to = from as libc::c_char;
    }
    request
}

/// One netdevice(7) request in the network namespace that this process is in.
fn interface_ioctl(number: libc::Ioctl, request: &mut libc::ifreq) -> nix::Result<()> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    // SAFETY: the requests used in this file read and write the ifreq (and what it points to), which lives on.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), number, std::ptr::from_mut(request)) }).map(drop)
}

/// Has the interface take the address that it is given, at once and no other: the network has one guest, so
/// that duplicate address detection would only make the command wait, and what a router advertises is known.
fn prepare_ipv6(notes: &mut Vec<String>) {
    for (key, value) in [("accept_dad", "0"), ("accept_ra", "0"), ("disable_ipv6", "0")] {
        let path = format!("/proc/sys/net/ipv6/conf/{INTERFACE}/{key}");
        if let Err(error) = fs::write(&path, value) {
            notes.push(format!("IPv6 may come late to the command: {path}: {error}"));
        }
    }
}

/// Switches IPv6 off for every interface of this namespace, now and later: where the network carries none, an
/// address that leads nowhere only makes programs wait.
fn switch_ipv6_off(notes: &mut Vec<String>) {
    for which in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
        match fs::write(&path, "1") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                notes.push(format!(
                    "IPv6 stays on for the guest's interface: {path}: {error}"
                ));
            }
            _ => {}
        }
    }
}

/// Lets a command without capabilities do in its own network what it could as root of a machine: ping,
/// and listen on low ports.
fn allow_without_capabilities(notes: &mut Vec<String>) {
    let gid = nix::unistd::getegid();
    for (path, value) in [
        ("/proc/sys/net/ipv4/ping_group_range", format!("{gid} {gid}")),
        ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0".to_owned()),
    ] {
        if let Err(error) = fs::write(path, value) {
            notes.push(format!(
                "the command cannot ping or listen below 1024: {path}: {error}"
            ));
        }
    }
}
