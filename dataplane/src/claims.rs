//! Which guest holds which IPv6 address of a network: those of its prefix that guests make themselves
//! (RFC 4862), and those on the link.
//!
//! First come, first served; an address is never two guests' at once. How many one guest may have is the
//! engine's, which also gives back what it no longer uses. IPv4 addresses are [`crate::leases`]'s.

use std::net::Ipv6Addr;

use ahash::AHashMap;
use vnet_proto::model::VmId;

use crate::mac::Mac;

/// Addresses held in one network at once.
pub const CLAIMS_MAX: usize = 8_192;

/// The IPv6 addresses of one network.
#[derive(Debug, Default)]
pub struct Claims {
    held: AHashMap<Ipv6Addr, (VmId, Mac)>,
    refused: u64,
}

impl Claims {
    /// Whether an address is this guest's from now on: it was free, or its own already. The caller has checked
    /// that it may be a guest's at all.
    pub fn claim(&mut self, vm: VmId, mac: Mac, address: Ipv6Addr) -> bool {
        let claimed = match self.held.get(&address) {
            Some((owner, _)) => *owner == vm,
            None if self.held.len() >= CLAIMS_MAX => false,
            None => {
                self.held.insert(address, (vm, mac));
                true
            }
        };
        self.refused += u64::from(!claimed);
        claimed
    }

    /// The guest gives an address back.
    pub fn release(&mut self, vm: VmId, address: Ipv6Addr) {
        if self.held.get(&address).is_some_and(|(owner, _)| *owner == vm) {
            self.held.remove(&address);
        }
    }

    /// A guest's link is gone: all that it held is free.
    pub fn release_vm(&mut self, vm: VmId) {
        self.held.retain(|_, (owner, _)| *owner != vm);
    }

    /// The guest whose an address is, and the MAC address that it showed it with.
    pub fn holder(&self, address: Ipv6Addr) -> Option<(VmId, Mac)> {
        self.held.get(&address).copied()
    }

    /// Claims of addresses that are another's, or beyond [`CLAIMS_MAX`].
    pub fn refused(&self) -> u64 {
        self.refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn address(n: usize) -> Ipv6Addr {
        Ipv6Addr::from_bits((0xfd00 << 112) + n as u128)
    }

    #[test]
    fn an_address_is_the_first_guests_until_it_gives_it_back_or_is_gone() {
        let (one, two) = (VmId(1), VmId(2));
        let mut claims = Claims::default();
        assert!(claims.claim(one, MAC, address(2)) && claims.claim(one, MAC, address(2)));
        assert!(!claims.claim(two, MAC, address(2)));
        assert_eq!(
            (claims.holder(address(2)), claims.refused()),
            (Some((one, MAC)), 1)
        );
        claims.release(two, address(2));
        assert_eq!(claims.holder(address(2)), Some((one, MAC)), "it was not its own");
        claims.release(one, address(2));
        assert!(claims.claim(two, MAC, address(2)));
        claims.release_vm(two);
        assert_eq!(claims.holder(address(2)), None);
    }

    #[test]
    fn a_full_table_refuses_what_is_new() {
        let mut claims = Claims::default();
        for n in 0..CLAIMS_MAX {
            assert!(claims.claim(VmId(1), MAC, address(n)));
        }
        assert!(!claims.claim(VmId(2), MAC, address(CLAIMS_MAX)));
        assert!(claims.claim(VmId(1), MAC, address(0)), "its own already");
    }
}
