//! Interfaces, addresses and routes, by rtnetlink(7).
//!
//! A connection belongs to the network namespace that its thread was in when it was made, and stays
//! with it: that is how one interface can be handed to a namespace that was entered later.

use std::future::Future;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::route::RouteScope;
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::error::{Failure, Step};

/// Talks to the network namespace that this thread was in when it was made.
pub(crate) struct Netlink {
    runtime: tokio::runtime::Runtime,
    handle: Handle,
}

impl Netlink {
    /// For the namespace that this thread is in. Starts no thread.
    pub(crate) fn new() -> Result<Netlink, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .step("start the loop that talks to the network namespace")?;
        let _inside = runtime.enter();
        let (connection, handle, _) =
            rtnetlink::new_connection().step("open a socket to the network namespace")?;
        runtime.spawn(connection);
        drop(_inside);
        Ok(Netlink { runtime, handle })
    }

    /// Runs one request; `step` is for "cannot ...".
    fn run(
        &self,
        step: impl Into<String>,
        request: impl Future<Output = Result<(), rtnetlink::Error>>,
    ) -> Result<(), Failure> {
        self.runtime.block_on(request).map_err(|error| match error {
            rtnetlink::Error::NetlinkError(ref answer) => Failure::new(step, answer.to_io()),
            other => Failure::new(step, other),
        })
    }

    /// Makes a pair of interfaces that are each other's wire.
    pub(crate) fn add_veth(&self, name: &str, peer: &str) -> Result<(), Failure> {
        let message = LinkVeth::new(name, peer).build();
        self.run(
            format!("make the veth pair {name}, {peer}"),
            self.handle.link().add(message).execute(),
        )
    }

    /// Moves an interface into another network namespace, where it is down and without addresses.
    pub(crate) fn move_to(&self, name: &str, namespace: BorrowedFd<'_>) -> Result<(), Failure> {
        let message = link(name).setns_by_fd(namespace.as_raw_fd()).build();
        self.run(
            format!("move {name} into its network namespace"),
            self.handle.link().change(message).execute(),
        )
    }

    /// Sets the MTU and the length of the queue.
    pub(crate) fn configure(&self, name: &str, mtu_bytes: u16, queue_length: u32) -> Result<(), Failure> {
        let message = link(name).mtu(mtu_bytes.into()).txqueuelen(queue_length).build();
        self.run(
            format!("set the MTU of {name} to {mtu_bytes}"),
            self.handle.link().change(message).execute(),
        )
    }

    /// Brings an interface up.
    pub(crate) fn up(&self, name: &str) -> Result<(), Failure> {
        let message = link(name).up().build();
        self.run(
            format!("bring {name} up"),
            self.handle.link().change(message).execute(),
        )
    }

    /// Gives an interface an address that may be used at once.
    pub(crate) fn add_address(&self, name: &str, address: IpNet) -> Result<(), Failure> {
        let index = index_of(name)?;
        let mut request = self
            .handle
            .address()
            .add(index, address.addr(), address.prefix_len());
        if address.addr().is_ipv6() {
            // Duplicate address detection would hold it back for a second or two.
            request
                .message_mut()
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        self.run(format!("give {name} the address {address}"), request.execute())
    }

    /// The default route through a router on an interface's own subnet.
    pub(crate) fn add_default_route(&self, router: IpAddr) -> Result<(), Failure> {
        let step = format!("set the default route through {router}");
        let any = match router {
            IpAddr::V4(_) => IpNet::from(ipnet::Ipv4Net::default()),
            IpAddr::V6(_) => IpNet::from(ipnet::Ipv6Net::default()),
        };
        let route = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(any.addr(), any.prefix_len())
            .and_then(|route| route.gateway(router))
            .step(step.clone())?
            .build();
        self.run(step, self.handle.route().add(route).execute())
    }

    /// A route to a prefix that is at the other end of an interface's wire.
    pub(crate) fn add_link_route(&self, name: &str, prefix: IpNet) -> Result<(), Failure> {
        let step = format!("set the route to {prefix} through {name}");
        let route = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(prefix.network(), prefix.prefix_len())
            .step(step.clone())?
            .output_interface(index_of(name)?)
            .scope(if prefix.addr().is_ipv4() {
                RouteScope::Link
            } else {
                RouteScope::Universe
            })
            .build();
        self.run(step, self.handle.route().add(route).execute())
    }
}

/// The start of a change to a named interface.
fn link(name: &str) -> LinkMessageBuilder<LinkUnspec> {
    LinkUnspec::new_with_name(name)
}

/// The index of an interface in the namespace that this thread is in.
pub(crate) fn index_of(name: &str) -> Result<u32, Failure> {
    nix::net::if_::if_nametoindex(name).step(format!("find the interface {name}"))
}
