//! Who the guest is: one MAC address, and the addresses of the subnet that were free when it came to use
//! them.

use std::net::Ipv4Addr;

use crate::engine::frame::DropReason;
use crate::engine::{Engine, Time};
use crate::mac::Mac;

/// Addresses one link may bind.
const ADDRESSES_MAX: usize = 16;

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
        if !self.is_guest_address(source) {
            return Err(DropReason::SpoofedAddress);
        }
        if self.addresses.len() >= ADDRESSES_MAX {
            return Err(DropReason::AddressLimit);
        }
        if !self.surroundings.claim(self.config.vm, mac, source, now) {
            return Err(DropReason::SpoofedAddress);
        }
        self.bind_address(source);
        Ok(())
    }

    pub(super) fn bind_address(&mut self, address: Ipv4Addr) {
        if !self.addresses.contains(&address) {
            self.addresses.push(address);
            self.note_status();
        }
    }

    /// Whether an address may be a guest's at all.
    pub(super) fn is_guest_address(&self, address: Ipv4Addr) -> bool {
        let subnet = &self.config.subnet;
        subnet.contains(&address)
            && address != subnet.network()
            && address != subnet.broadcast()
            && address != self.config.gateway
            && Some(address) != self.config.host_alias
    }
}
