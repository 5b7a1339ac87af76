package api

import (
	"net/http"

	"github.com/gin-gonic/gin"

	"github.com/orgkeys/orgkeys/internal/enroll"
)

type deviceEntry struct {
	EK        string `json:"ek"`
	OrgID     string `json:"orgId"`
	Note      string `json:"note,omitempty"`
	CreatedAt string `json:"createdAt"`
}

type deviceAnswer struct {
	success
	Data deviceEntry `json:"data"`
}

type deviceList struct {
	Success bool          `json:"success"`
	Data    []deviceEntry `json:"data"`
	Total   int           `json:"total"`
}

func deviceOf(x *exchange, d enroll.AllowedDevice) deviceEntry {
	return deviceEntry{d.EK, string(x.org), d.Note, instant(d.Created)}
}

func (a *API) allowDevice(c *gin.Context) {
	body, ok := a.adminBody(c)
	if !ok {
		return
	}
	x := exchangeOf(c)
	device, err := a.Enrollments.AllowDevice(c.Request.Context(), x.call(), x.org, c.Param("ek"), body)
	if err != nil {
		a.fail(c, err)
		return
	}
	writeJSON(c, http.StatusOK, deviceAnswer{success{true, "Device allowed"}, deviceOf(x, device)})
}

func (a *API) listDevices(c *gin.Context) {
	x := exchangeOf(c)
	all, err := a.Enrollments.ListDevices(c.Request.Context(), x.call(), x.org)
	if err != nil {
		a.fail(c, err)
		return
	}
	list := deviceList{true, make([]deviceEntry, len(all)), len(all)}
	for i, d := range all {
		list.Data[i] = deviceOf(x, d)
	}
	a.writeList(c, list)
}

func (a *API) getDevice(c *gin.Context) {
	x := exchangeOf(c)
	device, err := a.Enrollments.GetDevice(c.Request.Context(), x.call(), x.org, c.Param("ek"))
	if err != nil {
		a.fail(c, err)
		return
	}
	writeJSON(c, http.StatusOK, deviceAnswer{success{true, "Device retrieved"}, deviceOf(x, device)})
}

func (a *API) removeDevice(c *gin.Context) {
	x := exchangeOf(c)
	if err := a.Enrollments.RemoveDevice(c.Request.Context(), x.call(), x.org, c.Param("ek")); err != nil {
		a.fail(c, err)
		return
	}
	writeJSON(c, http.StatusOK, success{true, "Device removed. Keys in it stay: delete them if they are to end."})
}
