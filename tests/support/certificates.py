"""Certificate authorities of the two teams, and the files with what they issue."""

from pathlib import Path

import trustme

from bridge.http.route import Tls


class Authority:
    """A certificate authority, and files with what it issues."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._issued: list[str] = []
        self.file = folder / "ca.pem"
        self.renew()

    def issue(self, name: str) -> dict[str, str]:
        """Write a certificate for *name* and its key. Returns the two fields of the settings."""
        files = {"certificate_file": self._folder / name / "tls.crt", "key_file": self._folder / name / "tls.key"}
        made = self.ca.issue_cert(name)
        for path, blob in zip(files.values(), (made.cert_chain_pems[0], made.private_key_pem), strict=True):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(blob.bytes())
        self._issued.append(name)
        return {field: str(path) for field, path in files.items()}

    def renew(self) -> None:
        """Replace the authority and all that it has issued. What it issued before is valid nowhere."""
        self.ca = trustme.CA()
        self._folder.mkdir(exist_ok=True)
        self.ca.cert_pem.write_to_path(str(self.file))
        for name in self._issued[:]:
            self.issue(name)


def tls_of(**files: str) -> Tls:
    """As the settings read it."""
    return Tls.model_validate(files)
