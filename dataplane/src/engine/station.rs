//! Who the guest is: one MAC address, and the addresses of the subnet, of the prefix and of the link that
//! were free when it came to use them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use crate::engine::frame::DropReason;
use crate::engine::nat::may_be_a_guests;
use crate::engine::tcp::TCP_IDLE;
use crate::engine::{Engine, Time};
use crate::mac::Mac;

/// Addresses one link may bind, of both families together.
pub(super) const ADDRESSES_MAX: usize = 16;
/// How long an IPv6 address that is not used stays the guest's when there is no room for another. Guests take
/// new temporary ones every day (RFC 8981) and do not say when they leave the old. No flow rests on one that
/// is silent for so long.
pub(super) const ADDRESS_IDLE: Duration = TCP_IDLE;

/// An IPv6 address of the guest's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Address6 {
    pub(super) address: Ipv6Addr,
    last_used: Time,
}

impl Engine {
    /// The first MAC address of a link is the link's; any other is somebody's who it is not.
    pub(super) fn check_station(&mut self, source: Mac) -> Result<(), DropReason> {
        match self.mac {
            Some(mac) if mac == source => {}
            None if source.is_unicast()
                && source != self.config.gateway_mac
                && self.surroundings.learn_mac(self.config.vm, source) =>
            {
                self.mac = Some(source);
                self.note_status();
            }
            _ => return Err(DropReason::SpoofedMac),
        }
        self.transmit.guest = source;
        Ok(())
    }

    /// An address is the guest's when it has it already, or it is free: first come, first served.
    pub(super) fn check_source(&mut self, now: Time, mac: Mac, source: Ipv4Addr) -> Result<(), DropReason> {
        if self.addresses.contains(&source) {
            return Ok(());
        }
        if !self.is_guest_address(source.into()) {
            return Err(DropReason::SpoofedAddress);
        }
        self.make_room_for_address(now)?;
        if !self.surroundings.claim(self.config.vm, mac, source.into(), now) {
            return Err(DropReason::SpoofedAddress);
        }
        self.bind_address(source);
        Ok(())
    }

    /// The same for IPv6.
    pub(super) fn check_source_ipv6(
        &mut self,
        now: Time,
        mac: Mac,
        source: Ipv6Addr,
    ) -> Result<(), DropReason> {
        if let Some(own) = self.addresses_ipv6.iter_mut().find(|own| own.address == source) {
            own.last_used = now;
            return Ok(());
        }
        if !self.is_guest_address(source.into()) {
            return Err(DropReason::SpoofedAddress);
        }
        self.make_room_for_address(now)?;
        if !self.surroundings.claim(self.config.vm, mac, source.into(), now) {
            return Err(DropReason::SpoofedAddress);
        }
        self.addresses_ipv6.push(Address6 {
            address: source,
            last_used: now,
        });
        self.note_status();
        Ok(())
    }

    /// Whether an address is the guest's.
    pub(super) fn has_address(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => self.addresses.contains(&v4),
            IpAddr::V6(v6) => self.addresses_ipv6.iter().any(|own| own.address == v6),
        }
    }

    /// Room for one more address: an IPv6 address that was not used for long makes way.
    fn make_room_for_address(&mut self, now: Time) -> Result<(), DropReason> {
        if self.addresses.len() + self.addresses_ipv6.len() < ADDRESSES_MAX {
            return Ok(());
        }
        let idle = self
            .addresses_ipv6
            .iter()
            .enumerate()
            .filter(|(_, own)| now.saturating_sub(own.last_used) >= ADDRESS_IDLE)
            .min_by_key(|(_, own)| own.last_used)
            .map(|(at, _)| at)
            .ok_or(DropReason::AddressLimit)?;
        let gone = self.addresses_ipv6.swap_remove(idle);
        self.surroundings.release(self.config.vm, gone.address);
        self.end_switched_of(now, gone.address.into());
        self.note_status();
        Ok(())
    }

    pub(super) fn bind_address(&mut self, address: Ipv4Addr) {
        if !self.addresses.contains(&address) {
            self.addresses.push(address);
            self.note_status();
        }
    }

    /// Whether an address may be a guest's at all.
    pub(super) fn is_guest_address(&self, address: IpAddr) -> bool {
        match (address, &self.config.ipv6) {
            (IpAddr::V4(v4), _) => {
                may_be_a_guests(v4, &self.config.subnet, self.config.gateway, &self.config.nat)
            }
            (IpAddr::V6(v6), Some(ipv6)) => {
                // The first address of a prefix is any router's (RFC 4291 §2.6.1).
                let in_prefix = ipv6.prefix.contains(&v6) && v6 != ipv6.prefix.network();
                (in_prefix || is_link_local(v6)) && !self.is_gateway(address)
            }
            (IpAddr::V6(_), None) => false,
        }
    }

    /// Whether an address is one of the gateway's own.
    pub(super) fn is_gateway(&self, address: IpAddr) -> bool {
        match (address, &self.config.ipv6) {
            (IpAddr::V4(v4), _) => v4 == self.config.gateway,
            (IpAddr::V6(v6), Some(ipv6)) => v6 == ipv6.gateway || v6 == ipv6.link_local,
            (IpAddr::V6(_), None) => false,
        }
    }

    /// Whether guests have, or may come to have, an address.
    pub(super) fn is_on_link(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => self.config.subnet.contains(&v4),
            IpAddr::V6(v6) => self.config.ipv6.as_ref().is_some_and(|i| i.prefix.contains(&v6)),
        }
    }

    /// The address of the gateway that speaks to an address of a guest's.
    pub(super) fn gateway_towards(&self, guest: IpAddr) -> IpAddr {
        match (guest, &self.config.ipv6) {
            (IpAddr::V6(v6), Some(ipv6)) if is_link_local(v6) => ipv6.link_local.into(),
            (IpAddr::V6(_), Some(ipv6)) => ipv6.gateway.into(),
            (IpAddr::V6(_), None) | (IpAddr::V4(_), _) => self.config.gateway.into(),
        }
    }
}

/// Whether an address is of the form that interfaces have on a link (RFC 4291 §2.5.6).
fn is_link_local(address: Ipv6Addr) -> bool {
    address.segments()[..4] == [0xfe80, 0, 0, 0]
}
