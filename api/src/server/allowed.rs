//! Whom the API is for, by what the kernel tells of a client.

use std::fs;
use std::io;

/// Users that are served, whatever the permissions of the socket file are. Root is not, unless it is named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Their user ids.
    pub uids: Vec<u32>,
    /// Their group ids; a client has the one that it was started with, not its supplementary ones.
    pub gids: Vec<u32>,
}

impl Allowed {
    pub(super) fn takes(&self, client: &tokio::net::unix::UCred) -> bool {
        self.uids.contains(&client.uid()) || self.gids.contains(&client.gid())
    }

    /// That the kernel tells these from all others. In a user namespace, whoever is not in its map has the same number as the next one.
    pub(super) fn check(&self) -> io::Result<()> {
        for (what, ids) in [("uid", &self.uids), ("gid", &self.gids)] {
            let file = format!("/proc/self/{what}_map");
            let map =
                fs::read_to_string(&file).map_err(|error| io::Error::new(error.kind(), format!("{file}: {error}")))?;
            if let Some(id) = ids.iter().find(|id| !has(&map, **id)) {
                let text = format!(
                    "the API cannot be kept for {what} {id}: the user namespace of this process does not have it, so the kernel \
                     would not tell who it is; start the jailer with --userns host, or leave the choice to the permissions of the socket"
                );
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        }
        Ok(())
    }
}

/// Whether a map (user_namespaces(7): first number inside, first one outside, how many) has this number.
fn has(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u64>());
        let (Some(Ok(first)), Some(Ok(count))) = (numbers.next(), numbers.nth(1)) else { return false };
        u64::from(id).checked_sub(first).is_some_and(|offset| offset < count)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_told_from_others_if_the_namespace_has_it() {
        let host = "         0          0 4294967295\n";
        assert!(has(host, 0) && has(host, 65534) && has(host, u32::MAX - 1) && !has(host, u32::MAX));
        let jail = "      2001       2001          1\n";
        assert!(has(jail, 2001) && !has(jail, 2002) && !has(jail, 2000) && !has(jail, 0) && !has(jail, 65534));
        assert!(!has("", 0) && !has("0 0\n", 0) && !has("x y z\n", 0));
        assert!(has("0 1000 10\n100 5000 2\n", 101));
    }
}
